/* Processes run for the host: cold (spawned here) or warm (by the runner). */
#ifndef TARTARUS_EXEC_H
#define TARTARUS_EXEC_H

#include "flow.h"

#include <sys/resource.h>

struct exec {
	struct stream stream;
	struct output out, err;
	struct input in;
	uint64_t credit;
	bool tty;
	bool has_input;
	pid_t pid; /* 0: not started yet */
	bool warm;
	bool exited;
	uint8_t exit_payload[36];
	uint32_t exit_size;
	/* Kept until it has started. */
	int child_fds[3];
	uint8_t *request; /* the EXEC payload, for the runner and for falling back */
	uint32_t request_size;
	struct exec *next_waiting; /* in the runner's queue */
	uint32_t early_signals[8]; /* signals that came before the start, and their scopes */
	uint32_t n_early;
};

int exec_open(struct session *session, uint32_t id, const uint8_t *payload, uint32_t size);
/* A frame for an exec. Unlike other streams, it can't be cancelled: a process ends by signals. */
int exec_control(struct session *session, struct stream *stream, const struct frame *frame, struct cursor *payload);
/* Nobody will hear of this exec any more. Its processes live on, unless `and_kill`. */
void exec_let_go(struct session *session, struct stream *stream, bool and_kill);
/* Start it as an ordinary program. It ends with an ERROR when that fails. */
void exec_start_cold(struct session *session, struct exec *exec);
/* It runs, as `pid`. */
void exec_started(struct session *session, struct exec *exec, pid_t pid, bool warm);
/* A process ended: was it one of ours? `usage` is NULL when the runner says so: then only its own are meant. */
bool exec_reaped(struct session *session, pid_t pid, int status, const struct rusage *usage);

/* Is any process still running, or its end not yet told? */
bool exec_any(const struct session *session);

/* pty.c: a new terminal; fds[0] for us, fds[1] for the program. 0 or -errno. */
int open_terminal(int fds[2], uint16_t rows, uint16_t cols);
void resize_terminal(int fd, uint16_t rows, uint16_t cols);

#endif
