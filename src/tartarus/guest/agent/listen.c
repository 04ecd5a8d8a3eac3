/*
 * A monitor that offers vsock breaks every connection of a machine that it saves or restores; listening sockets stay.
 * So the channel is what was accepted last. The host alone may connect: a process of the guest could otherwise become
 * the host of its own agent.
 */
#include "listen.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* As linux/vm_sockets.h has it, which not every libc's headers go with. */
struct vsock_address {
	sa_family_t family;
	unsigned short reserved;
	unsigned port;
	unsigned cid;
	unsigned char flags;
	unsigned char zero[3];
};

enum { VSOCK_FAMILY = 40, BACKLOG = 4 };

static const unsigned VSOCK_ANY = 0xffffffffU, VSOCK_HOST = 2;

int listen_vsock(unsigned port)
{
	struct vsock_address address = {.family = VSOCK_FAMILY, .port = port, .cid = VSOCK_ANY};
	int fd = socket(VSOCK_FAMILY, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return -1;
	if (bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, BACKLOG) == 0)
		return fd;
	int error = errno;
	close(fd);
	errno = error;
	return -1;
}

static bool is_host(int fd)
{
	union {
		struct sockaddr any;
		struct vsock_address vsock;
		struct sockaddr_storage room;
	} peer = {0};
	socklen_t size = sizeof peer;

	if (getpeername(fd, &peer.any, &size) != 0)
		return false;
	return peer.any.sa_family != VSOCK_FAMILY || peer.vsock.cid == VSOCK_HOST;
}

static void drop_channel(struct session *session)
{
	session_close(session, &session->config.channel_fd);
	session->channel_readable = false;
	/* Nothing is sent until somebody listens. */
	session->out.blocked = true;
}

/*
 * Whoever comes next greets first: what was on its way to or from the one before is nobody's, and what the streams of
 * that one go on producing stays here until the greeting says what becomes of them.
 */
static void begin_anew(struct session *session)
{
	session->awaited = true;
	session->out.head = session->out.tail = 0;
	session->out.header_left = 0;
	session->out.splice_left = 0;
	session->out.blocked = true;
	decoder_free(&session->decoder);
	session->decoder = (struct decoder){0};
}

bool listen_lost(struct session *session)
{
	if (session->config.listen_fd < 0)
		return false;
	drop_channel(session);
	return true;
}

static void listener_ready(struct session *session, struct source *source, uint32_t events)
{
	int fd;

	(void)source;
	(void)events;
	while ((fd = accept4(session->config.listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
		if (!is_host(fd)) {
			close(fd);
			continue;
		}
		drop_channel(session);
		if (!session_watch(session, fd, &session->channel_source, EPOLLIN | EPOLLOUT | EPOLLRDHUP)) {
			close(fd);
			continue;
		}
		session->config.channel_fd = fd;
		session->channel_readable = true;
		begin_anew(session);
	}
}

bool listen_attach(struct session *session)
{
	if (session->config.listen_fd < 0)
		return true;
	session->out.blocked = session->config.channel_fd < 0;
	session->listen_source.ready = listener_ready;
	return session_watch(session, session->config.listen_fd, &session->listen_source, EPOLLIN);
}
