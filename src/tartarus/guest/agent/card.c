/* See card.h. The gateway is the only neighbour; what the address is allowed is decided outside. */
#include "card.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define CARD "eth0"
#define SYSCTL "/proc/sys/net/ipv6/conf/" CARD "/"
#define RESOLV_CONF "/etc/resolv.conf"

enum { IPV4_SIZE = 4, BOTH_SIZE = 20, WHOLE_6 = 128, METRIC_6 = 1024 };

/* As linux/ipv6.h has it, which can't be included beside the C library's headers. */
struct in6_ifreq {
	struct in6_addr ifr6_addr;
	uint32_t ifr6_prefixlen;
	int ifr6_ifindex;
};

static struct sockaddr inet(const uint8_t *bytes)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	struct sockaddr out;

	if (bytes != NULL)
		memcpy(&address.sin_addr, bytes, IPV4_SIZE);
	memcpy(&out, &address, sizeof out);
	return out;
}

static bool set_flags(int fd, short flags)
{
	struct ifreq request = {.ifr_name = CARD, .ifr_flags = flags};

	return ioctl(fd, SIOCSIFFLAGS, &request) == 0;
}

static bool set_address(int fd, unsigned long what, const uint8_t *bytes)
{
	struct ifreq request = {.ifr_name = CARD};

	request.ifr_addr = inet(bytes);
	return ioctl(fd, (int)what, &request) == 0;
}

static bool add_route(int fd, const uint8_t *to, const uint8_t *by)
{
	static char card[] = CARD;
	static const uint8_t whole[IPV4_SIZE] = {255, 255, 255, 255};
	struct rtentry entry = {.rt_flags = RTF_UP, .rt_dev = card};

	entry.rt_dst = inet(to);
	entry.rt_genmask = inet(to == NULL ? NULL : whole);
	entry.rt_flags |= to == NULL ? 0 : RTF_HOST;
	if (by != NULL) {
		entry.rt_gateway = inet(by);
		entry.rt_flags |= RTF_GATEWAY;
	}
	return ioctl(fd, SIOCADDRT, &entry) == 0;
}

static void set(const char *name, const char *value)
{
	char path[sizeof SYSCTL + 32];

	(void)snprintf(path, sizeof path, SYSCTL "%s", name);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)!write(fd, value, strlen(value));
		close(fd);
	}
}

/* No address that nobody gave it, and none of before. */
static void no_ipv6(void)
{
	set("disable_ipv6", "1");
}

/* One address and one neighbour, who is not asked for anything else. */
static bool join_6(const uint8_t *address, const uint8_t *gateway)
{
	static const char *const off[] = {"accept_ra", "autoconf", "router_solicitations", "accept_redirects",
					  "dad_transmits", "accept_dad"};
	int index = (int)if_nametoindex(CARD);
	struct in6_ifreq own = {.ifr6_prefixlen = WHOLE_6, .ifr6_ifindex = index};
	struct in6_rtmsg way = {.rtmsg_flags = RTF_UP | RTF_GATEWAY, .rtmsg_metric = METRIC_6, .rtmsg_ifindex = index};

	for (size_t i = 0; i < sizeof off / sizeof off[0]; i++)
		set(off[i], "0");
	set("addr_gen_mode", "1");
	set("disable_ipv6", "0");
	memcpy(&own.ifr6_addr, address, sizeof own.ifr6_addr);
	memcpy(&way.rtmsg_gateway, gateway, sizeof way.rtmsg_gateway);
	int fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return false;
	bool done = ioctl(fd, SIOCSIFADDR, &own) == 0 && ioctl(fd, SIOCADDRT, &way) == 0;
	close(fd);
	return done;
}

static bool name_server(const uint8_t *gateway)
{
	char line[64];
	int size = snprintf(line, sizeof line, "nameserver %u.%u.%u.%u\n", gateway[0], gateway[1], gateway[2], gateway[3]);

	/* Templates have links there, to what only their first process would make. */
	(void)unlink(RESOLV_CONF);
	int fd = open(RESOLV_CONF, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
	bool done = fd >= 0 && write(fd, line, (size_t)size) == size;

	if (fd >= 0)
		close(fd);
	return done;
}

bool card_join(struct span address, struct span gateway, uint32_t mtu)
{
	static const uint8_t whole[IPV4_SIZE] = {255, 255, 255, 255};
	struct ifreq size = {.ifr_name = CARD, .ifr_mtu = (int)mtu};

	if ((address.size != IPV4_SIZE && address.size != BOTH_SIZE) || gateway.size != address.size)
		return false;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return false;
	no_ipv6();
	bool done = set_flags(fd, 0) && set_address(fd, SIOCSIFADDR, address.bytes) &&
		    set_address(fd, SIOCSIFNETMASK, whole) && ioctl(fd, SIOCSIFMTU, &size) == 0 && set_flags(fd, IFF_UP) &&
		    add_route(fd, gateway.bytes, NULL) && add_route(fd, NULL, gateway.bytes);
	close(fd);
	if (done && address.size == BOTH_SIZE && !join_6(address.bytes + IPV4_SIZE, gateway.bytes + IPV4_SIZE))
		no_ipv6(); /* A kernel without it has the rest. */
	return done && name_server(gateway.bytes);
}
