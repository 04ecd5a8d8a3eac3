/* See forward.h. */
#include "forward.h"

#include "flow.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

struct forward {
	struct stream stream;
	struct source source; /* while it connects */
	struct output out;
	struct input in;
	uint64_t credit;
	uint16_t port;
	int connecting; /* the socket, until it is connected; then -1 */
	bool ready, second_try, end_sent;
};

static void connect_ready(struct session *session, struct source *source, uint32_t events)
{
	(void)session;
	(void)events;
	CONTAINER_OF(source, struct forward, source)->ready = true;
}

/* Begin to connect to the loopback of one address family. 0 or -errno. */
static int begin(struct session *session, struct forward *forward, int family)
{
	struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(forward->port),
				 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(forward->port),
				  .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	const void *address = family == AF_INET ? (const void *)&v4 : (const void *)&v6;
	socklen_t size = family == AF_INET ? sizeof v4 : sizeof v6;
	int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return -errno;
	forward->connecting = fd;
	forward->ready = false;
	if (connect(fd, address, size) != 0 && errno != EINPROGRESS)
		return -errno;
	return session_watch(session, fd, &forward->source, EPOLLIN | EPOLLOUT) ? 0 : -errno;
}

static void fail(struct session *session, struct forward *forward, int error)
{
	out_error(session, forward->stream.id, error, "connect");
	stream_end(&forward->stream);
}

/* A server may listen on only one of the two loopbacks. */
static void try_other(struct session *session, struct forward *forward, int error)
{
	session_close(session, &forward->connecting);
	if (forward->second_try || begin(session, forward, AF_INET6) != 0) {
		fail(session, forward, error);
		return;
	}
	forward->second_try = true;
}

/* The socket is connected: one descriptor for each direction, so that each has its own end. */
static int start_flows(struct session *session, struct forward *forward)
{
	int fd = forward->connecting;
	int writing = fcntl(fd, F_DUPFD_CLOEXEC, 3);

	if (writing < 0)
		return -errno;
	forward->in.fd = writing;
	if (epoll_ctl(session->epoll_fd, EPOLL_CTL_DEL, fd, NULL) != 0)
		return -errno;
	forward->connecting = -1;
	forward->out.fd = fd;
	if (!session_watch(session, fd, &forward->out.source, EPOLLIN | EPOLLRDHUP) ||
	    !session_watch(session, writing, &forward->in.source, EPOLLOUT))
		return -errno;
	out_frame(session, F_RESULT, forward->stream.id, NULL, 0);
	return 0;
}

static void finish_connect(struct session *session, struct forward *forward)
{
	int error = 0;
	socklen_t size = sizeof error;

	if (getsockopt(forward->connecting, SOL_SOCKET, SO_ERROR, &error, &size) != 0)
		error = errno;
	if (error == 0)
		error = -start_flows(session, forward);
	else if (error == ECONNREFUSED) {
		try_other(session, forward, error);
		return;
	}
	if (error != 0)
		fail(session, forward, error);
}

static bool forward_pump(struct session *session, struct stream *stream)
{
	struct forward *forward = CONTAINER_OF(stream, struct forward, stream);

	if (forward->connecting >= 0) {
		if (forward->ready)
			finish_connect(session, forward);
		return false;
	}
	bool empty = input_pump(session, stream->id, &forward->in);
	if (forward->in.fd >= 0 && forward->in.at_end && empty) {
		shutdown(forward->in.fd, SHUT_WR);
		session_close(session, &forward->in.fd);
	}
	bool more = output_pump(session, stream->id, &forward->out, &forward->credit);
	if (forward->out.fd < 0 && !forward->end_sent) {
		forward->end_sent = true;
		out_frame(session, F_FORWARD_TO_HOST_EOF, stream->id, NULL, 0);
	}
	if (forward->end_sent && forward->in.fd < 0) {
		out_frame(session, F_RESULT, stream->id, NULL, 0);
		stream_end(stream);
		return false;
	}
	return more;
}

static int forward_control(struct session *session, struct stream *stream, const struct frame *frame,
			   struct cursor *payload)
{
	struct forward *forward = CONTAINER_OF(stream, struct forward, stream);
	uint32_t bytes = 0;

	(void)session;
	if (frame->type == F_CREDIT)
		bytes = get_u32(payload);
	else if (frame->type == F_FORWARD_TO_GUEST_EOF)
		forward->in.at_end = true;
	else
		return -EPROTO;
	if (!cursor_done(payload))
		return -EPROTO;
	forward->credit += bytes;
	return 0;
}

static int forward_data(struct session *session, struct stream *stream, uint8_t type, const uint8_t *bytes, uint32_t size)
{
	struct forward *forward = CONTAINER_OF(stream, struct forward, stream);

	(void)session;
	/* Before the answer to CONNECT there is nowhere to keep it. */
	if (type != F_FORWARD_TO_GUEST || forward->connecting >= 0)
		return -EPROTO;
	return input_take(&forward->in, bytes, size);
}

static void forward_destroy(struct session *session, struct stream *stream)
{
	struct forward *forward = CONTAINER_OF(stream, struct forward, stream);

	session_close(session, &forward->connecting);
	output_close(session, &forward->out);
	input_free(session, &forward->in);
}

static struct allowances forward_allowances(const struct stream *stream)
{
	const struct forward *forward = (const struct forward *)(const void *)stream;

	return (struct allowances){forward->credit, forward->in.allowance};
}

static const struct stream_kind forward_kind = {
	.allowances = forward_allowances,
	.control = forward_control,
	.data = forward_data,
	.pump = forward_pump,
	.destroy = forward_destroy,
};

int serve_connect(struct session *session, uint32_t id, struct cursor *payload)
{
	uint16_t port = get_u16(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	struct forward *forward = port == 0 ? NULL : calloc(1, sizeof *forward);
	if (forward == NULL) {
		out_error(session, id, port == 0 ? EINVAL : ENOMEM, "connect");
		return 0;
	}
	forward->source.ready = connect_ready;
	forward->port = port;
	forward->connecting = -1;
	forward->credit = INPUT_WINDOW;
	output_init(&forward->out, -1, F_FORWARD_TO_HOST, false);
	input_init(&forward->in, -1);
	stream_add(session, &forward->stream, &forward_kind, id);
	int status = begin(session, forward, AF_INET);
	if (status != 0)
		try_other(session, forward, -status);
	return 0;
}
