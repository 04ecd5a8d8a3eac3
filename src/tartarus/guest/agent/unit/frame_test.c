/* Tests of frame decoding and payload reading, run under the address and undefined-behaviour sanitizers. */
#include "frame.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                      \
	do {                                                                                  \
		if (!(condition)) {                                                           \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
			exit(1);                                                              \
		}                                                                             \
	} while (0)

/* What a sink has seen. */
struct seen {
	uint32_t controls, data_bytes, checksum;
	uint32_t last_type;
	uint32_t last_stream;
	int refuse; /* what the sink answers */
};

static int see_control(void *context, const struct frame *frame, const uint8_t *payload)
{
	struct seen *seen = context;

	seen->controls++;
	seen->last_type = frame->type;
	seen->last_stream = frame->stream;
	for (uint32_t i = 0; i < frame->length; i++)
		seen->checksum = seen->checksum * 31 + payload[i];
	return seen->refuse;
}

static int see_data(void *context, const struct frame *frame, const uint8_t *bytes, uint32_t size)
{
	struct seen *seen = context;

	CHECK(size > 0);
	seen->data_bytes += size;
	seen->last_type = frame->type;
	for (uint32_t i = 0; i < size; i++)
		seen->checksum = seen->checksum * 31 + bytes[i];
	return seen->refuse;
}

static const struct frame_sink sink = {see_control, see_data};

static size_t append(uint8_t *out, size_t at, uint8_t type, uint32_t stream, const void *payload, uint32_t size)
{
	put_header(out + at, type, 0, stream, size);
	if (size > 0)
		memcpy(out + at + FRAME_HEADER, payload, size);
	return at + FRAME_HEADER + size;
}

/* Feed from a heap block of exactly the right size, so that reading past it is caught. */
static int feed(struct decoder *decoder, const uint8_t *bytes, size_t size, struct seen *seen)
{
	uint8_t *copy = malloc(size > 0 ? size : 1);
	int status;

	CHECK(copy != NULL);
	if (size > 0)
		memcpy(copy, bytes, size);
	status = decoder_feed(decoder, copy, size, &sink, seen);
	free(copy);
	return status;
}

static void test_every_way_to_cut(void)
{
	uint8_t bytes[512];
	size_t size = append(bytes, 0, F_PING, 0, "payload", 7);

	size = append(bytes, size, F_STDIN, 5, "some input", 10);
	size = append(bytes, size, F_STDIN_EOF, 5, NULL, 0);
	size = append(bytes, size, F_STDIN, 6, NULL, 0);
	size = append(bytes, size, F_SHUTDOWN, 0, "\0\0\0\0", 4);
	struct seen whole = {0};
	struct decoder decoder = {0};
	CHECK(feed(&decoder, bytes, size, &whole) == 0);
	CHECK(whole.controls == 3 && whole.data_bytes == 10 && whole.last_type == F_SHUTDOWN);
	for (size_t first = 0; first <= size; first++)
		for (size_t second = first; second <= size; second++) {
			struct seen seen = {0};

			CHECK(feed(&decoder, bytes, first, &seen) == 0);
			CHECK(feed(&decoder, bytes + first, second - first, &seen) == 0);
			CHECK(feed(&decoder, bytes + second, size - second, &seen) == 0);
			CHECK(memcmp(&seen, &whole, sizeof seen) == 0);
		}
	decoder_free(&decoder);
}

static int feed_header(uint8_t type, uint8_t flags, uint16_t zero, uint32_t length)
{
	uint8_t header[FRAME_HEADER];
	struct decoder decoder = {0};
	struct seen seen = {0};

	put_header(header, type, flags, 1, length);
	header[6] = (uint8_t)zero;
	header[7] = (uint8_t)(zero >> 8);
	int status = feed(&decoder, header, sizeof header, &seen);
	decoder_free(&decoder);
	return status;
}

static void test_limits(void)
{
	CHECK(feed_header(F_EXEC, 0, 0, FRAME_CONTROL_MAX) == 0);
	CHECK(feed_header(F_EXEC, 0, 0, FRAME_CONTROL_MAX + 1) == -EPROTO);
	CHECK(feed_header(F_EXEC, 0, 0, UINT32_MAX) == -EPROTO);
	CHECK(feed_header(F_STDIN, 0, 0, FRAME_DATA_MAX) == 0);
	CHECK(feed_header(F_STDIN, 0, 0, FRAME_DATA_MAX + 1) == -EPROTO);
	CHECK(feed_header(F_PING, 1, 0, 0) == -EPROTO);
	CHECK(feed_header(F_PING, 0, 1, 0) == -EPROTO);
	CHECK(feed_header(F_PING, 0, 0x100, 0) == -EPROTO);
}

static void test_a_refusal_stops(void)
{
	uint8_t bytes[64];
	size_t size = append(bytes, 0, F_PING, 0, NULL, 0);
	struct decoder decoder = {0};
	struct seen seen = {.refuse = -EPROTO};

	size = append(bytes, size, F_PING, 0, NULL, 0);
	CHECK(feed(&decoder, bytes, size, &seen) == -EPROTO);
	CHECK(seen.controls == 1);
	decoder_free(&decoder);
}

static void test_cursor(void)
{
	const uint8_t bytes[] = {1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 'o', 'k'};
	struct cursor cursor = cursor_over(bytes, sizeof bytes);

	CHECK(get_u16(&cursor) == 1 && get_u32(&cursor) == 2 && get_u64(&cursor) == 3);
	struct span text = get_string(&cursor);
	CHECK(text.size == 2 && memcmp(text.bytes, "ok", 2) == 0 && cursor_done(&cursor));
	CHECK(get_u16(&cursor) == 0 && cursor.bad && !cursor_done(&cursor));
	/* After one read too many nothing is believed any more. */
	cursor = cursor_over(bytes, 3);
	CHECK(get_u32(&cursor) == 0 && get_u16(&cursor) == 0 && !cursor_done(&cursor));
	/* A length that would overflow. */
	const uint8_t huge[] = {255, 255, 255, 255, 'x'};
	cursor = cursor_over(huge, sizeof huge);
	text = get_string(&cursor);
	CHECK(text.bytes == NULL && text.size == 0 && cursor.bad);
}

static void test_paths(void)
{
	char path[8];

	CHECK(copy_path((struct span){(const uint8_t *)"/a", 2}, path, sizeof path) == 0 && strcmp(path, "/a") == 0);
	CHECK(copy_path((struct span){(const uint8_t *)"/a\0b", 4}, path, sizeof path) == -EINVAL);
	CHECK(copy_path((struct span){(const uint8_t *)"", 0}, path, sizeof path) == -EINVAL);
	CHECK(copy_path((struct span){(const uint8_t *)"12345678", 8}, path, sizeof path) == -ENAMETOOLONG);
	CHECK(copy_path((struct span){(const uint8_t *)"1234567", 7}, path, sizeof path) == 0);
}

static size_t put_text(uint8_t *out, size_t at, const char *text, uint32_t size)
{
	put_u32(out + at, size);
	memcpy(out + at + 4, text, size);
	return at + 4 + size;
}

/* An EXEC of `echo hi` in /tmp with A=1. Returns its size. */
static size_t sample_exec(uint8_t *out)
{
	memset(out, 0, 12);
	put_u32(out, EXEC_STDIN);
	out[4] = 24;
	out[6] = 80;
	put_u32(out + 8, 1000);
	size_t at = put_text(out, 12, "/tmp", 4);
	put_u32(out + at, 2);
	at = put_text(out, at + 4, "echo", 4);
	at = put_text(out, at, "hi", 2);
	put_u32(out + at, 1);
	return put_text(out, at + 4, "A=1", 3);
}

static int parse(const uint8_t *bytes, size_t size, struct exec_request *request)
{
	uint8_t *copy = malloc(size > 0 ? size : 1);
	int status;

	CHECK(copy != NULL);
	if (size > 0)
		memcpy(copy, bytes, size);
	status = exec_request_parse(request, copy, (uint32_t)size);
	free(copy);
	return status;
}

static void test_exec(void)
{
	uint8_t bytes[256];
	size_t size = sample_exec(bytes);
	struct exec_request request;

	CHECK(parse(bytes, size, &request) == 0);
	CHECK(request.flags == EXEC_STDIN && request.rows == 24 && request.cols == 80 && request.window == 1000);
	CHECK(strcmp(request.cwd, "/tmp") == 0);
	CHECK(strcmp(request.argv[0], "echo") == 0 && strcmp(request.argv[1], "hi") == 0 && request.argv[2] == NULL);
	CHECK(strcmp(request.envp[0], "A=1") == 0 && request.envp[1] == NULL);
	exec_request_free(&request);
	for (size_t cut = 0; cut < size; cut++)
		CHECK(parse(bytes, cut, &request) == -EPROTO);
	bytes[size] = 0;
	CHECK(parse(bytes, size + 1, &request) == -EPROTO);
}

static void test_exec_that_no_kernel_would_take(void)
{
	uint8_t bytes[256];
	struct exec_request request;
	size_t at;

	memset(bytes, 0, sizeof bytes);
	CHECK(parse(bytes, 12 + 4 + 4 + 4, &request) == -EINVAL); /* no argument at all */
	put_u32(bytes + 16, 1);
	CHECK(parse(bytes, 12 + 4 + 4 + 4 + 4, &request) == -EINVAL); /* an empty name */
	at = put_text(bytes, 20, "a\0b", 3);
	put_u32(bytes + at, 0);
	CHECK(parse(bytes, at + 4, &request) == -EINVAL); /* a NUL byte */
	put_u32(bytes + 16, UINT32_MAX);
	CHECK(parse(bytes, at + 4, &request) == -EPROTO); /* more arguments than bytes */
}

static uint32_t next_random(uint64_t *state)
{
	*state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (uint32_t)(*state >> 33);
}

/* Valid frames with some bytes changed, cut anywhere: nothing may crash, leak or read past the end. */
static void test_noise(void)
{
	uint64_t state = 1;

	for (int round = 0; round < 20000; round++) {
		uint8_t payload[256], bytes[1024];
		size_t payload_size = sample_exec(payload);
		size_t size = append(bytes, 0, F_EXEC, 1, payload, (uint32_t)payload_size);
		struct decoder decoder = {0};
		struct exec_request request;
		struct seen seen = {0};

		size = append(bytes, size, F_STDIN, 1, payload, next_random(&state) % 100);
		for (uint32_t changes = next_random(&state) % 6; changes > 0; changes--) {
			uint32_t noise = next_random(&state);

			bytes[noise % size] = (uint8_t)(noise >> 16);
			payload[noise % payload_size] = (uint8_t)(noise >> 8);
		}
		if (parse(payload, payload_size, &request) == 0)
			exec_request_free(&request);
		for (size_t at = 0; at < size;) {
			size_t piece = 1 + next_random(&state) % 40;

			piece = piece < size - at ? piece : size - at;
			if (feed(&decoder, bytes + at, piece, &seen) != 0)
				break;
			at += piece;
		}
		decoder_free(&decoder);
	}
}

int main(void)
{
	test_every_way_to_cut();
	test_limits();
	test_a_refusal_stops();
	test_cursor();
	test_paths();
	test_exec();
	test_exec_that_no_kernel_would_take();
	test_noise();
	puts("frame_test: ok");
	return 0;
}
