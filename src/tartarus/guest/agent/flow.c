/* See flow.h. */
#include "flow.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum {
	SMALL_READ = 32 << 10,
	SPLICE_MIN = 32 << 10,
	PIPE_SIZE = 1 << 20,
	TTY_DRAIN = 128 << 10, /* more than a terminal's buffers hold */
	GRANT_STEP = INPUT_WINDOW / 4,
};

static void output_ready(struct session *session, struct source *source, uint32_t events)
{
	struct output *output = CONTAINER_OF(source, struct output, source);

	(void)session;
	output->ready = true;
	output->hung_up |= (events & (EPOLLHUP | EPOLLERR)) != 0;
}

void output_init(struct output *output, int fd, uint8_t type, bool is_pipe)
{
	memset(output, 0, sizeof *output);
	output->source.ready = output_ready;
	output->fd = fd;
	output->type = type;
	output->is_pipe = is_pipe;
}

void output_close(struct session *session, struct output *output)
{
	session_close(session, &output->fd);
}

void output_drain(struct session *session, struct output *output)
{
	int available = 0;

	if (output->fd < 0)
		return;
	output->ready = true;
	output->draining = true;
	output->drain_left = TTY_DRAIN;
	if (output->is_pipe && ioctl(output->fd, FIONREAD, &available) == 0) {
		/* What a frame under way has yet to take is there, but already sent as far as this stream goes. */
		uint32_t under_way = out_pending_from(session, output->fd);
		output->drain_left = (uint32_t)available > under_way ? (uint32_t)available - under_way : 0;
	}
}

/* `size` bytes were taken from the descriptor and are on their way. */
static void account(struct session *session, struct output *output, uint64_t *credit, uint32_t size)
{
	*credit -= size;
	if (!output->draining)
		return;
	output->drain_left -= size;
	if (output->drain_left == 0)
		output_close(session, output);
}

/* Move a large piece inside the kernel. False when there is none, or not now. */
static bool splice_piece(struct session *session, uint32_t stream, struct output *output, uint32_t limit,
			 uint64_t *credit)
{
	int available = 0;

	if (ioctl(output->fd, FIONREAD, &available) != 0 || available < SPLICE_MIN || limit < SPLICE_MIN) {
		output->large = false;
		return false;
	}
	if (!output->grown) {
		/* Only for a stream that shows it needs it: large pipes count against a limit of the whole user. */
		output->grown = true;
		(void)fcntl(output->fd, F_SETPIPE_SZ, PIPE_SIZE);
	}
	uint32_t size = (uint32_t)available < limit ? (uint32_t)available : limit;
	out_splice(session, output->type, stream, output->fd, size);
	/* The pipe must stay open until it is spliced: finishing it waits for the next round. */
	*credit -= size;
	if (output->draining)
		output->drain_left -= size;
	return true;
}

static bool read_piece(struct session *session, uint32_t stream, struct output *output, uint32_t limit,
		       uint64_t *credit)
{
	uint32_t size = limit < SMALL_READ ? limit : SMALL_READ;
	uint8_t *room = out_reserve(session, size);

	if (room == NULL)
		return false;
	ssize_t n = read(output->fd, room, size);
	if (n < 0 && errno == EINTR)
		return true;
	if (n < 0 && errno == EAGAIN && !output->draining) {
		output->ready = false;
		return false;
	}
	if (n < 0 && errno == EIO && !output->is_pipe && !output->draining) {
		/* No process has the terminal open at the moment. Its owner is alive and may open it again. */
		output->ready = false;
		return false;
	}
	if (n <= 0) { /* end of file, or nothing left to drain */
		output_close(session, output);
		return false;
	}
	out_commit(session, output->type, 0, stream, (uint32_t)n);
	output->large = output->is_pipe && (uint32_t)n == SMALL_READ;
	account(session, output, credit, (uint32_t)n);
	if ((uint32_t)n < size && output->is_pipe && !output->hung_up && !output->draining)
		output->ready = false; /* emptied: the next byte, or the end, is a new event */
	return output->fd >= 0 && output->ready;
}

bool output_pump(struct session *session, uint32_t stream, struct output *output, uint64_t *credit)
{
	if (output->fd < 0 || !output->ready || out_busy(session))
		return false;
	if (output->draining && output->drain_left == 0) {
		output_close(session, output);
		return false;
	}
	/* Without credit nothing is sent, but an end with nothing before it is noticed. */
	if (*credit == 0) {
		int available = 1;

		if (output->hung_up && output->is_pipe && ioctl(output->fd, FIONREAD, &available) == 0 && available == 0)
			output_close(session, output);
		return false;
	}
	uint32_t limit = *credit < FRAME_DATA_MAX ? (uint32_t)*credit : FRAME_DATA_MAX;
	if (output->draining && output->drain_left < limit)
		limit = output->drain_left;
	if (output->large && !session->out.cannot_splice) {
		if (session->out.head < session->out.tail) {
			out_flush(session);
			if (session->out.head < session->out.tail)
				return false;
		}
		if (splice_piece(session, stream, output, limit, credit))
			return !out_busy(session);
	}
	return read_piece(session, stream, output, limit, credit);
}

bool output_discard(struct session *session, struct output *output)
{
	static uint8_t nowhere[SMALL_READ];

	if (output->fd < 0 || !output->ready)
		return false;
	size_t size = sizeof nowhere;
	if (output->draining && output->drain_left < size)
		size = output->drain_left;
	ssize_t n = size == 0 ? 0 : read(output->fd, nowhere, size);
	if (n < 0 && errno == EINTR)
		return true;
	/* EIO: no process has the terminal open at the moment. */
	if (n < 0 && !output->draining && (errno == EAGAIN || (errno == EIO && !output->is_pipe))) {
		output->ready = false;
		return false;
	}
	if (n <= 0) {
		output_close(session, output);
		return false;
	}
	if (output->draining)
		output->drain_left -= (uint32_t)n;
	return true;
}

static void input_ready(struct session *session, struct source *source, uint32_t events)
{
	(void)session;
	(void)events;
	CONTAINER_OF(source, struct input, source)->ready = true;
}

void input_init(struct input *input, int fd)
{
	memset(input, 0, sizeof *input);
	input->source.ready = input_ready;
	input->fd = fd;
	input->ready = true;
	input->allowance = INPUT_WINDOW;
}

int input_take(struct input *input, const uint8_t *bytes, uint32_t size)
{
	if (size > input->allowance || input->at_end)
		return -EPROTO;
	input->allowance -= size;
	if (input->fd < 0) {
		input->owed += size;
		return 0;
	}
	return input_take_own(input, bytes, size);
}

int input_take_own(struct input *input, const uint8_t *bytes, uint32_t size)
{
	if (input->capacity - input->tail < size && input->head > 0) {
		memmove(input->bytes, input->bytes + input->head, input->tail - input->head);
		input->tail -= input->head;
		input->head = 0;
	}
	if (input->capacity - input->tail < size) {
		size_t capacity = input->capacity == 0 ? 1024 : input->capacity;

		while (capacity - input->tail < size)
			capacity *= 2;
		uint8_t *grown = realloc(input->bytes, capacity);
		if (grown == NULL)
			return -ENOMEM;
		input->bytes = grown;
		input->capacity = capacity;
	}
	memcpy(input->bytes + input->tail, bytes, size);
	input->tail += size;
	return 0;
}

static void drop_rest(struct input *input)
{
	input->owed += (uint32_t)(input->tail - input->head);
	input->head = input->tail = 0;
}

bool input_pump(struct session *session, uint32_t stream, struct input *input)
{
	while (input->fd >= 0 && input->ready && input->head < input->tail) {
		ssize_t n = write(input->fd, input->bytes + input->head, input->tail - input->head);

		if (n >= 0) {
			input->head += (size_t)n;
			input->owed += (uint32_t)n;
		} else if (errno == EAGAIN) {
			input->ready = false;
		} else if (errno != EINTR) {
			session_close(session, &input->fd);
		}
	}
	if (input->fd < 0)
		drop_rest(input);
	if (input->head == input->tail) {
		free(input->bytes);
		input->bytes = NULL;
		input->head = input->tail = input->capacity = 0;
	}
	if (input->owed >= GRANT_STEP && !input->at_end) {
		out_u32(session, F_STDIN_CREDIT, stream, input->owed);
		input->allowance += input->owed;
		input->owed = 0;
	}
	return input->tail == 0;
}

void input_free(struct session *session, struct input *input)
{
	free(input->bytes);
	input->bytes = NULL;
	session_close(session, &input->fd);
}
