/* Frame decoding and payload reading. Every byte is checked before it is believed. */
#include "frame.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint16_t u16_at(const uint8_t *bytes)
{
	return (uint16_t)(bytes[0] | bytes[1] << 8);
}

static uint32_t u32_at(const uint8_t *bytes)
{
	return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

void put_u32(uint8_t *out, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		out[i] = (uint8_t)(value >> (8 * i));
}

void put_u64(uint8_t *out, uint64_t value)
{
	for (int i = 0; i < 8; i++)
		out[i] = (uint8_t)(value >> (8 * i));
}

void put_header(uint8_t out[FRAME_HEADER], uint8_t type, uint8_t flags, uint32_t stream, uint32_t length)
{
	put_u32(out, length);
	out[4] = type;
	out[5] = flags;
	out[6] = 0;
	out[7] = 0;
	put_u32(out + 8, stream);
}

static bool is_data(uint8_t type)
{
	return type == F_STDIN || type == F_WRITE_DATA || type == F_FORWARD_TO_GUEST;
}

static int read_header(struct decoder *decoder)
{
	const uint8_t *header = decoder->header;
	struct frame *frame = &decoder->frame;

	frame->length = u32_at(header);
	frame->type = header[4];
	frame->flags = header[5];
	frame->stream = u32_at(header + 8);
	if (frame->flags != 0 || header[6] != 0 || header[7] != 0)
		return -EPROTO;
	if (frame->length > (is_data(frame->type) ? FRAME_DATA_MAX : FRAME_CONTROL_MAX))
		return -EPROTO;
	decoder->left = frame->length;
	return 0;
}

/* Take what belongs to the current control frame; hand the frame over when it is whole. */
static int feed_control(struct decoder *decoder, const uint8_t **at, size_t *size, const struct frame_sink *sink,
			void *context)
{
	const uint8_t *payload = *at;
	uint32_t take = *size < decoder->left ? (uint32_t)*size : decoder->left;
	int status = 0;

	if (decoder->body == NULL && take < decoder->left) {
		decoder->body = malloc(decoder->frame.length);
		if (decoder->body == NULL)
			return -ENOMEM;
		decoder->body_size = 0;
	}
	if (decoder->body != NULL) {
		memcpy(decoder->body + decoder->body_size, *at, take);
		decoder->body_size += take;
		payload = decoder->body;
	}
	*at += take;
	*size -= take;
	decoder->left -= take;
	if (decoder->left > 0)
		return 0;
	status = sink->control(context, &decoder->frame, payload);
	free(decoder->body);
	decoder->body = NULL;
	decoder->header_size = 0;
	return status;
}

static int feed_data(struct decoder *decoder, const uint8_t **at, size_t *size, const struct frame_sink *sink,
		     void *context)
{
	uint32_t take = *size < decoder->left ? (uint32_t)*size : decoder->left;
	int status = take > 0 ? sink->data(context, &decoder->frame, *at, take) : 0;

	*at += take;
	*size -= take;
	decoder->left -= take;
	if (decoder->left == 0)
		decoder->header_size = 0;
	return status;
}

int decoder_feed(struct decoder *decoder, const uint8_t *bytes, size_t size, const struct frame_sink *sink,
		 void *context)
{
	while (size > 0 || (decoder->header_size == FRAME_HEADER && decoder->left == 0)) {
		int status;

		if (decoder->header_size < FRAME_HEADER) {
			size_t missing = FRAME_HEADER - decoder->header_size;
			size_t take = size < missing ? size : missing;

			memcpy(decoder->header + decoder->header_size, bytes, take);
			decoder->header_size += (uint32_t)take;
			bytes += take;
			size -= take;
			if (decoder->header_size < FRAME_HEADER)
				return 0;
			status = read_header(decoder);
		} else if (is_data(decoder->frame.type)) {
			status = feed_data(decoder, &bytes, &size, sink, context);
		} else {
			status = feed_control(decoder, &bytes, &size, sink, context);
		}
		if (status != 0)
			return status;
	}
	return 0;
}

void decoder_free(struct decoder *decoder)
{
	free(decoder->body);
	memset(decoder, 0, sizeof *decoder);
}

struct cursor cursor_over(const uint8_t *payload, uint32_t size)
{
	return (struct cursor){payload, payload + size, false};
}

static const uint8_t *take(struct cursor *cursor, uint32_t size)
{
	const uint8_t *at = cursor->at;

	if (cursor->bad || size > (size_t)(cursor->end - at)) {
		cursor->bad = true;
		return NULL;
	}
	cursor->at += size;
	return at;
}

uint16_t get_u16(struct cursor *cursor)
{
	const uint8_t *at = take(cursor, 2);
	return at == NULL ? 0 : u16_at(at);
}

uint32_t get_u32(struct cursor *cursor)
{
	const uint8_t *at = take(cursor, 4);
	return at == NULL ? 0 : u32_at(at);
}

uint64_t get_u64(struct cursor *cursor)
{
	const uint8_t *at = take(cursor, 8);
	return at == NULL ? 0 : u32_at(at) | (uint64_t)u32_at(at + 4) << 32;
}

struct span get_string(struct cursor *cursor)
{
	uint32_t size = get_u32(cursor);
	const uint8_t *at = take(cursor, size);

	return at == NULL ? (struct span){NULL, 0} : (struct span){at, size};
}

bool cursor_done(const struct cursor *cursor)
{
	return !cursor->bad && cursor->at == cursor->end;
}

int copy_path(struct span span, char *out, size_t size)
{
	if (span.size == 0 || memchr(span.bytes, 0, span.size) != NULL)
		return -EINVAL;
	if (span.size >= size)
		return -ENAMETOOLONG;
	memcpy(out, span.bytes, span.size);
	out[span.size] = '\0';
	return 0;
}

/* Copies strings of a payload behind each other, each with its NUL. */
struct packer {
	char *at;
	bool nul;
};

static char *pack(struct packer *packer, struct span span)
{
	char *start = packer->at;

	if (span.size > 0) {
		packer->nul |= memchr(span.bytes, 0, span.size) != NULL;
		memcpy(start, span.bytes, span.size);
	}
	start[span.size] = '\0';
	packer->at += span.size + 1;
	return start;
}

/* Step over a list without copying; returns its count, or marks the cursor bad. */
static uint32_t skip_list(struct cursor *cursor)
{
	uint32_t count = get_u32(cursor);

	if (count > (size_t)(cursor->end - cursor->at) / 4)
		cursor->bad = true;
	for (uint32_t i = 0; i < count && !cursor->bad; i++)
		get_string(cursor);
	return cursor->bad ? 0 : count;
}

static void pack_list(struct packer *packer, struct cursor *cursor, char **out)
{
	uint32_t count = get_u32(cursor);

	for (uint32_t i = 0; i < count; i++)
		out[i] = pack(packer, get_string(cursor));
	out[count] = NULL;
}

int exec_request_parse(struct exec_request *request, const uint8_t *payload, uint32_t size)
{
	struct cursor cursor = cursor_over(payload, size);
	struct packer packer = {NULL, false};

	memset(request, 0, sizeof *request);
	request->flags = get_u32(&cursor);
	request->rows = get_u16(&cursor);
	request->cols = get_u16(&cursor);
	request->window = get_u32(&cursor);
	struct cursor strings = cursor;
	get_string(&cursor);
	uint32_t n_args = skip_list(&cursor);
	uint32_t n_env = skip_list(&cursor);
	if (!cursor_done(&cursor))
		return -EPROTO;
	if (n_args == 0)
		return -EINVAL;
	/* Each string of n bytes took 4 + n in the payload and takes n + 1 here, so `size` is room enough. */
	size_t pointers = ((size_t)n_args + n_env + 2) * sizeof(char *);
	request->memory = malloc(pointers + size);
	if (request->memory == NULL)
		return -ENOMEM;
	request->argv = request->memory;
	request->envp = request->argv + n_args + 1;
	packer.at = (char *)request->memory + pointers;
	request->cwd = pack(&packer, get_string(&strings));
	pack_list(&packer, &strings, request->argv);
	pack_list(&packer, &strings, request->envp);
	if (packer.nul || request->argv[0][0] == '\0') {
		exec_request_free(request);
		return -EINVAL;
	}
	return 0;
}

void exec_request_free(struct exec_request *request)
{
	free(request->memory);
	memset(request, 0, sizeof *request);
}
