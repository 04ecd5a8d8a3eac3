/* What the agent's own files share: the session, its streams, and its way out to the host. */
#ifndef TARTARUS_SESSION_H
#define TARTARUS_SESSION_H

#include "agent.h"
#include "frame.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

struct session;

/* Something epoll watches. Registered edge-triggered: `ready` notes what it is told, `pump` does the work. */
struct source {
	void (*ready)(struct session *session, struct source *source, uint32_t events);
};

#define CONTAINER_OF(pointer, type, member) ((type *)(void *)((char *)(pointer) - offsetof(type, member)))

struct stream;

/* Bytes that the guest may send on a stream, and that the host may, before the other end grants more. */
struct allowances {
	uint64_t output;
	uint32_t input;
};

/* What one kind of stream does. Unset members: nothing. */
struct stream_kind {
	/* A frame for this stream. 0, or a negative errno that ends the session (malformed payload). */
	int (*control)(struct session *session, struct stream *stream, const struct frame *frame, struct cursor *payload);
	/* Data for this stream. 0, or a negative errno that ends the session (more than was granted). */
	int (*data)(struct session *session, struct stream *stream, uint8_t type, const uint8_t *bytes, uint32_t size);
	/* Do a bounded piece of the work at hand. True when more could be done at once. */
	bool (*pump)(struct session *session, struct stream *stream);
	/* Release what the stream holds, but not the stream itself. */
	void (*destroy)(struct session *session, struct stream *stream);
	/* Where its flow control stands. */
	struct allowances (*allowances)(const struct stream *stream);
};

/* An exec, a file transfer, a watch, a port forward: anything that lives under one stream id. */
struct stream {
	struct stream *next;
	const struct stream_kind *kind;
	uint32_t id;
	uint8_t opened_by; /* the type of its first frame */
	bool let_go;	   /* no host listens: what a program writes is read and forgotten */
	bool ended; /* freed after the current round, so that no pending event can meet freed memory */
};

/* Bytes on their way to the host. */
struct outbox {
	uint8_t *bytes;
	size_t capacity, head, tail;
	/* A data frame whose payload goes from a pipe to the socket inside the kernel. It comes before `bytes`. */
	uint8_t header[FRAME_HEADER];
	uint32_t header_left;
	uint32_t splice_left;
	int splice_pipe;
	bool cannot_splice;
	bool blocked; /* the socket took all it could */
};

struct runner;

struct session {
	struct agent_config config;
	int epoll_fd;
	int signal_fd;
	struct source channel_source;
	struct source signal_source;
	struct source listen_source;
	bool channel_readable;
	bool child_ended;
	bool childless;
	bool greeted;
	bool awaited; /* a host has come in, and has not greeted: what is under way is not for it */
	bool quiet; /* nothing is taken from programs and nothing is sent, but answers on stream 0 and to FIXUP */
	bool over;
	struct decoder decoder;
	struct outbox out;
	struct stream *streams;
	uint32_t n_streams;
	uint32_t last_stream;
	uint8_t opening; /* the type of the frame that opens the next stream */
	struct runner *runner;
	int64_t deadline_ms; /* of a SHUTDOWN, on the monotonic clock; 0: none */
	int64_t stop_ms; /* likewise of the newest STOP, which the guest outlives */
	uint32_t n_stops; /* that have no answer yet */
};

enum {
	READ_SIZE = 64 << 10,
	OUT_HIGH = 256 << 10, /* above this no stream produces and the channel is not read */
	STREAMS_MAX = 1024,
	INPUT_WINDOW = 256 << 10, /* stdin and forwarded bytes the host may send before a grant */
	WINDOW_MAX = 1 << 30,
};

/* agent.c */
bool session_watch(struct session *session, int fd, struct source *source, uint32_t events);
/*
 * Close a watched descriptor, if it is open. Closing alone does not end the watch: a program that is
 * just being started holds a copy until its execve is through, and events would meet freed memory.
 */
void session_close(struct session *session, int *fd);
void stream_add(struct session *session, struct stream *stream, const struct stream_kind *kind, uint32_t id);
void stream_end(struct stream *stream);
int64_t monotonic_ms(void);

/* out.c */
bool out_busy(const struct session *session);
/* Room for one frame's payload of up to `size` bytes, to be completed by out_commit. NULL: out of memory. */
uint8_t *out_reserve(struct session *session, uint32_t size);
void out_commit(struct session *session, uint8_t type, uint8_t flags, uint32_t stream, uint32_t size);
void out_frame(struct session *session, uint8_t type, uint32_t stream, const void *payload, uint32_t size);
void out_u32(struct session *session, uint8_t type, uint32_t stream, uint32_t value);
void out_error(struct session *session, uint32_t stream, int error, const char *what);
void out_splice(struct session *session, uint8_t type, uint32_t stream, int pipe, uint32_t size);
/* Bytes that a frame under way has yet to take from `pipe`. */
uint32_t out_pending_from(const struct session *session, int pipe);
void out_flush(struct session *session);

/* spawn.c */
struct launch {
	const struct exec_request *request;
	int fds[3];
	bool die_with_parent;
	const struct agent_config *machine; /* set in a virtual machine, whose agent is root */
	bool in_group; /* the new process was born in its control group */
	int error;        /* set when it failed: errno, and what it concerns */
	const char *what;
};

pid_t spawn(struct launch *launch);

#endif
