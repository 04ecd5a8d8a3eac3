/* The way out: frames queue in memory, and large output goes from pipe to socket inside the kernel. */
#include "session.h"

#include "listen.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { FIRST_CAPACITY = 4 << 10, KEEP_CAPACITY = 64 << 10 };

static bool splicing(const struct outbox *out)
{
	return out->header_left + out->splice_left > 0;
}

bool out_busy(const struct session *session)
{
	const struct outbox *out = &session->out;

	return splicing(out) || out->tail - out->head > OUT_HIGH;
}

uint32_t out_pending_from(const struct session *session, int pipe)
{
	return session->out.splice_pipe == pipe ? session->out.splice_left : 0;
}

/* Make room for `size` more bytes behind the tail. */
static bool make_room(struct outbox *out, size_t size)
{
	if (out->capacity - out->tail >= size)
		return true;
	if (out->head > 0) {
		memmove(out->bytes, out->bytes + out->head, out->tail - out->head);
		out->tail -= out->head;
		out->head = 0;
	}
	if (out->capacity - out->tail >= size)
		return true;
	size_t capacity = out->capacity == 0 ? FIRST_CAPACITY : out->capacity;
	while (capacity - out->tail < size)
		capacity *= 2;
	uint8_t *bytes = realloc(out->bytes, capacity);
	if (bytes == NULL)
		return false;
	out->bytes = bytes;
	out->capacity = capacity;
	return true;
}

uint8_t *out_reserve(struct session *session, uint32_t size)
{
	struct outbox *out = &session->out;

	if (!make_room(out, (size_t)size + FRAME_HEADER)) {
		session->over = true; /* an answer lost would leave the host waiting for ever */
		return NULL;
	}
	return out->bytes + out->tail + FRAME_HEADER;
}

void out_commit(struct session *session, uint8_t type, uint8_t flags, uint32_t stream, uint32_t size)
{
	struct outbox *out = &session->out;

	put_header(out->bytes + out->tail, type, flags, stream, size);
	out->tail += FRAME_HEADER + size;
}

void out_frame(struct session *session, uint8_t type, uint32_t stream, const void *payload, uint32_t size)
{
	uint8_t *room = out_reserve(session, size);

	if (room == NULL)
		return;
	if (size > 0)
		memcpy(room, payload, size);
	out_commit(session, type, 0, stream, size);
}

void out_u32(struct session *session, uint8_t type, uint32_t stream, uint32_t value)
{
	uint8_t payload[4];

	put_u32(payload, value);
	out_frame(session, type, stream, payload, sizeof payload);
}

void out_error(struct session *session, uint32_t stream, int error, const char *what)
{
	uint32_t length = (uint32_t)strnlen(what, 4096);
	uint8_t *room = out_reserve(session, 8 + length);

	if (room == NULL)
		return;
	put_u32(room, (uint32_t)error);
	put_u32(room + 4, length);
	memcpy(room + 8, what, length);
	out_commit(session, F_ERROR, 0, stream, 8 + length);
}

/* Send bytes; returns how many went. Marks the outbox blocked when not all did. */
static size_t send_some(struct session *session, const uint8_t *bytes, size_t size)
{
	size_t sent = 0;

	while (sent < size) {
		/* SIGPIPE is blocked, as all signals are. */
		ssize_t n = write(session->config.channel_fd, bytes + sent, size - sent);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			session->out.blocked = true;
			/* A closed channel also shows as end of file on the reading side, which ends the session. */
			if (errno != EAGAIN && !listen_lost(session))
				session->over = true;
			break;
		}
		sent += (size_t)n;
	}
	return sent;
}

/*
 * The kernel can't move the promised bytes: it does not splice this pipe, or a process of the
 * sandbox opened the pipe through /proc and took them. The frame's length is already sent, so the
 * payload is finished from what can be read, and zeros.
 */
static void finish_by_copy(struct session *session)
{
	struct outbox *out = &session->out;
	size_t left = out->splice_left;
	size_t filled = 0;

	if (!make_room(out, left)) {
		session->over = true;
		return;
	}
	memmove(out->bytes + out->head + left, out->bytes + out->head, out->tail - out->head);
	out->tail += left;
	while (filled < left) {
		ssize_t n = read(out->splice_pipe, out->bytes + out->head + filled, left - filled);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		filled += (size_t)n;
	}
	memset(out->bytes + out->head + filled, 0, left - filled);
	out->splice_left = 0;
}

static void flush_splice(struct session *session)
{
	struct outbox *out = &session->out;
	int available;

	while (out->header_left > 0 && !out->blocked)
		out->header_left -= (uint32_t)send_some(session, out->header + FRAME_HEADER - out->header_left,
							 out->header_left);
	while (out->splice_left > 0 && !out->blocked) {
		ssize_t n = splice(out->splice_pipe, NULL, session->config.channel_fd, NULL, out->splice_left,
				   SPLICE_F_MOVE | SPLICE_F_NONBLOCK);

		if (n > 0)
			out->splice_left -= (uint32_t)n;
		else if (n < 0 && errno == EAGAIN && ioctl(out->splice_pipe, FIONREAD, &available) == 0 && available > 0)
			out->blocked = true;
		else if (n < 0 && (errno == EPIPE || errno == ECONNRESET)) {
			session->over = !listen_lost(session);
			return;
		} else if (n >= 0 || errno != EINTR) {
			out->cannot_splice |= n < 0 && errno != EAGAIN;
			finish_by_copy(session);
		}
	}
}

void out_splice(struct session *session, uint8_t type, uint32_t stream, int pipe, uint32_t size)
{
	struct outbox *out = &session->out;

	put_header(out->header, type, 0, stream, size);
	out->header_left = FRAME_HEADER;
	out->splice_left = size;
	out->splice_pipe = pipe;
	flush_splice(session);
}

void out_flush(struct session *session)
{
	struct outbox *out = &session->out;

	if (out->blocked || session->over)
		return;
	flush_splice(session);
	if (!splicing(out) && out->head < out->tail && !out->blocked)
		out->head += send_some(session, out->bytes + out->head, out->tail - out->head);
	if (out->head == out->tail) {
		out->head = out->tail = 0;
		if (out->capacity > KEEP_CAPACITY) {
			free(out->bytes);
			out->bytes = NULL;
			out->capacity = 0;
		}
	}
}
