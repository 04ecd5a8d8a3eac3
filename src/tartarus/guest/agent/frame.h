/*
 * Frames and payloads of the channel, as bytes: no descriptors, no processes, so that this part
 * can be tested and fuzzed alone. docs/guest-protocol.md is the normative description.
 */
#ifndef TARTARUS_FRAME_H
#define TARTARUS_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
	PROTOCOL_VERSION = 1,
	FRAME_HEADER = 12,
	FRAME_CONTROL_MAX = 2 << 20, /* as much as execve(2) takes */
	FRAME_DATA_MAX = 256 << 10,
	FRAME_MORE = 1, /* flag of RESULT: another RESULT of the same answer follows */
};

enum frame_type {
	F_HELLO = 0x01,
	F_EXEC = 0x10,
	F_STDIN = 0x11,
	F_STDIN_EOF = 0x12,
	F_SIGNAL = 0x13,
	F_RESIZE = 0x14,
	F_CREDIT = 0x15,
	F_STAT = 0x20,
	F_LIST = 0x21,
	F_READ = 0x22,
	F_WRITE = 0x23,
	F_WRITE_DATA = 0x24,
	F_WRITE_END = 0x25,
	F_MKDIR = 0x26,
	F_MOVE = 0x27,
	F_REMOVE = 0x28,
	F_WATCH = 0x29,
	F_CANCEL = 0x2A,
	F_CONNECT = 0x30,
	F_FORWARD_TO_GUEST = 0x31,
	F_FORWARD_TO_GUEST_EOF = 0x32,
	F_FIXUP = 0x40,
	F_SHUTDOWN = 0x42,
	F_PING = 0x43,
	F_QUIESCE = 0x44,
	F_GO_ON = 0x45,
	F_STOP = 0x46,
	F_FREEZE = 0x4E,
	F_READY = 0x81,
	F_PONG = 0x83,
	F_QUIESCED = 0x84,
	F_STOPPED = 0x86,
	F_FROZEN = 0x8E,
	F_STARTED = 0x90,
	F_STDOUT = 0x91,
	F_STDERR = 0x92,
	F_EXIT = 0x93,
	F_STDIN_CREDIT = 0x94,
	F_FILE_DATA = 0xA0,
	F_RESULT = 0xA1,
	F_ERROR = 0xA2,
	F_EVENT = 0xA3,
	F_FORWARD_TO_HOST = 0xB1,
	F_FORWARD_TO_HOST_EOF = 0xB2,
};

struct frame {
	uint32_t length;
	uint8_t type;
	uint8_t flags;
	uint32_t stream;
};

/* Where decoded frames go. Both return 0, or a negative errno that ends the session. */
struct frame_sink {
	/* One whole frame that is not data. */
	int (*control)(void *context, const struct frame *frame, const uint8_t *payload);
	/* The next piece of a data frame, as it arrives: at least one byte. */
	int (*data)(void *context, const struct frame *frame, const uint8_t *bytes, uint32_t size);
};

/* All zero is the start state. */
struct decoder {
	uint8_t header[FRAME_HEADER];
	uint32_t header_size;
	struct frame frame;
	uint32_t left;
	uint8_t *body; /* a control frame's payload that came in pieces */
	uint32_t body_size;
};

/* Decode `size` more bytes. 0, or a negative errno (-EPROTO: not our protocol; -ENOMEM), after which it is unusable. */
int decoder_feed(struct decoder *decoder, const uint8_t *bytes, size_t size, const struct frame_sink *sink,
		 void *context);
void decoder_free(struct decoder *decoder);

void put_header(uint8_t out[FRAME_HEADER], uint8_t type, uint8_t flags, uint32_t stream, uint32_t length);
void put_u32(uint8_t *out, uint32_t value);
void put_u64(uint8_t *out, uint64_t value);

/* Reads a payload front to back. After a read past the end every value is zero and `bad` is set. */
struct cursor {
	const uint8_t *at;
	const uint8_t *end;
	bool bad;
};

struct span {
	const uint8_t *bytes;
	uint32_t size;
};

struct cursor cursor_over(const uint8_t *payload, uint32_t size);
uint16_t get_u16(struct cursor *cursor);
uint32_t get_u32(struct cursor *cursor);
uint64_t get_u64(struct cursor *cursor);
struct span get_string(struct cursor *cursor);
/* True when the payload was read whole, with nothing missing and nothing left over. */
bool cursor_done(const struct cursor *cursor);

/* Copy a string that must become a C string. 0, -EINVAL (holds a NUL, or empty) or -ENAMETOOLONG. */
int copy_path(struct span span, char *out, size_t size);

/* The payload of EXEC. Pointers reach into `memory`, which exec_request_free releases. */
struct exec_request {
	uint32_t flags;
	uint16_t rows;
	uint16_t cols;
	uint32_t window;
	char *cwd;
	char **argv;
	char **envp;
	void *memory;
};

enum { EXEC_TTY = 1, EXEC_STDIN = 2, EXEC_WARM = 4, EXEC_ONCE = 8 };

/* 0, -EPROTO (malformed), -EINVAL (empty argv, NUL bytes) or -ENOMEM. */
int exec_request_parse(struct exec_request *request, const uint8_t *payload, uint32_t size);
void exec_request_free(struct exec_request *request);

#endif
