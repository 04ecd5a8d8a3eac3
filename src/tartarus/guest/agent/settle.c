/* See settle.h. Of sockets only the table of their states is read: whose they are, and what they carry, is not. */
#include "settle.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CARD "eth0"

enum { TRIES = 20, BETWEEN_NS = 50 * 1000 * 1000, SYN_SENT = 2, SYN_RECV = 3, V4_BITS = 32, V6_BITS = 128 };

struct removal {
	struct nlmsghdr head;
	struct ifaddrmsg about;
	struct rtattr attribute;
	uint8_t address[sizeof(struct in6_addr)];
};

static bool opening_in(const char *table)
{
	char line[256];
	unsigned state;
	bool found = false;
	FILE *file = fopen(table, "re");

	if (file == NULL)
		return false;
	/* The first line names the columns; only numbers are read of the others. */
	while (!found && fgets(line, sizeof line, file) != NULL)
		found = sscanf(line, "%*d: %*[0-9A-Fa-f]:%*x %*[0-9A-Fa-f]:%*x %x", &state) == 1 &&
			(state == SYN_SENT || state == SYN_RECV);
	fclose(file);
	return found;
}

bool settle_wait(void)
{
	struct timespec pause = {.tv_nsec = BETWEEN_NS};

	for (int tried = 0; opening_in("/proc/net/tcp") || opening_in("/proc/net/tcp6"); tried++) {
		if (tried == TRIES)
			return false;
		nanosleep(&pause, NULL);
	}
	return true;
}

static bool forget(int fd, unsigned index, const char *text)
{
	struct removal asked = {.head = {.nlmsg_type = RTM_DELADDR, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK}};
	struct {
		struct nlmsghdr head;
		struct nlmsgerr error;
		char rest[sizeof(struct removal)];
	} answer;
	bool is_4 = inet_pton(AF_INET, text, asked.address) == 1;
	size_t size = is_4 ? sizeof(struct in_addr) : sizeof(struct in6_addr);

	if (!is_4 && inet_pton(AF_INET6, text, asked.address) != 1) {
		errno = EINVAL;
		return false;
	}
	asked.about = (struct ifaddrmsg){.ifa_family = is_4 ? AF_INET : AF_INET6, .ifa_index = index};
	asked.about.ifa_prefixlen = is_4 ? V4_BITS : V6_BITS;
	asked.attribute = (struct rtattr){.rta_len = (unsigned short)RTA_LENGTH(size), .rta_type = IFA_LOCAL};
	asked.head.nlmsg_len = (uint32_t)(NLMSG_LENGTH(sizeof asked.about) + RTA_LENGTH(size));
	if (send(fd, &asked, asked.head.nlmsg_len, 0) < 0)
		return false;
	ssize_t got = recv(fd, &answer, sizeof answer, 0);
	if (got < (ssize_t)(sizeof answer.head + sizeof answer.error.error) || answer.head.nlmsg_type != NLMSG_ERROR) {
		errno = EPROTO;
		return false;
	}
	errno = -answer.error.error;
	return answer.error.error == 0;
}

bool settle_forget(int count, char **addresses)
{
	unsigned index = if_nametoindex(CARD);
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	bool done = index != 0 && fd >= 0;

	for (int each = 0; done && each < count; each++)
		done = forget(fd, index, addresses[each]);
	if (fd >= 0) {
		int why = errno;
		close(fd);
		errno = why;
	}
	return done;
}
