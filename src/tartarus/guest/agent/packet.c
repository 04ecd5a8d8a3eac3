#include "packet.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

struct reply {
	char magic[4];
	uint32_t seq;
	uint32_t error;
	int32_t value;
};

void packet_answer(uint32_t seq, uint32_t error, int32_t value, int fd)
{
	struct reply reply = {{'T', 'C', 'L', 'D'}, seq, error, value};
	struct iovec iov = {&reply, sizeof reply};
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {{0}};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd >= 0) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = sizeof control.bytes;
		struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof fd);
		memcpy(CMSG_DATA(cmsg), &fd, sizeof fd);
	}
	while (sendmsg(CONTROL_FD, &msg, MSG_NOSIGNAL) < 0 && errno == EINTR)
		;
}

uint32_t u32_at(const unsigned char *bytes)
{
	uint32_t value;
	memcpy(&value, bytes, sizeof value);
	return value;
}

bool packet_receive(struct request *request)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int) * FDS_MAX)];
		struct cmsghdr align;
	} control;
	struct iovec iov = {request->bytes, PACKET_MAX};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
			     .msg_controllen = sizeof control.bytes};
	ssize_t got;

	request->n_fds = 0;
	do
		got = recvmsg(CONTROL_FD, &msg, MSG_CMSG_CLOEXEC);
	while (got < 0 && errno == EINTR);
	if (got <= 0)
		return false;
	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg); cmsg != NULL; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		size_t count = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(request->fds, CMSG_DATA(cmsg), count * sizeof(int));
		request->n_fds = count;
	}
	request->size = (size_t)got;
	return (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
}

bool read_strings(unsigned char **at, const unsigned char *end, char **out, char *pool, size_t pool_size)
{
	size_t used = 0;

	if (end - *at < 4)
		return false;
	uint32_t count = u32_at(*at);
	*at += 4;
	if (count >= STRINGS_MAX)
		return false;
	for (uint32_t i = 0; i < count; i++) {
		if (end - *at < 4)
			return false;
		uint32_t length = u32_at(*at);
		*at += 4;
		if (length > (size_t)(end - *at) || length >= pool_size - used)
			return false;
		memcpy(pool + used, *at, length);
		pool[used + length] = '\0';
		out[i] = pool + used;
		used += length + 1;
		*at += length;
	}
	out[count] = NULL;
	return true;
}
