/* Bytes between a descriptor inside the sandbox and a stream, with flow control both ways. */
#ifndef TARTARUS_FLOW_H
#define TARTARUS_FLOW_H

#include "session.h"

/* From a descriptor to the host. Never more than the host granted. */
struct output {
	struct source source;
	int fd; /* -1: finished */
	uint8_t type;
	bool is_pipe;
	bool ready;    /* there may be something to read */
	bool hung_up;  /* the other end is closed: what is there now is all */
	bool large;    /* reads come back full: worth a splice */
	bool grown;    /* the pipe was enlarged */
	bool draining; /* send `drain_left` more bytes, then finish */
	uint32_t drain_left;
};

void output_init(struct output *output, int fd, uint8_t type, bool is_pipe);
/* Send what `*credit` allows. True when more could be sent at once. Closes the descriptor at its end. */
bool output_pump(struct session *session, uint32_t stream, struct output *output, uint64_t *credit);
/* Read what is there, and forget it. True when more could be read at once. Closes the descriptor at its end. */
bool output_discard(struct session *session, struct output *output);
/* The writer is gone: send what is in the pipe now, and don't wait for others that hold it open. */
void output_drain(struct session *session, struct output *output);
void output_close(struct session *session, struct output *output);

/* From the host to a descriptor. Holds at most what the host was granted. */
struct input {
	struct source source;
	int fd; /* -1: nobody reads any more, bytes are dropped */
	bool ready;
	bool at_end; /* the host sends no more */
	uint8_t *bytes;
	size_t head, tail, capacity;
	uint32_t allowance;
	uint32_t owed; /* consumed and not yet granted again */
};

void input_init(struct input *input, int fd);
/* 0, -EPROTO (more than was granted) or -ENOMEM. */
int input_take(struct input *input, const uint8_t *bytes, uint32_t size);
/* The same for bytes of our own, which no grant covers. */
int input_take_own(struct input *input, const uint8_t *bytes, uint32_t size);
/* Write what the descriptor takes, grant what was consumed. True when nothing is left to write. */
bool input_pump(struct session *session, uint32_t stream, struct input *input);
void input_free(struct session *session, struct input *input);

#endif
