/* See exec.h. */
#include "exec.h"

#include "kill.h"
#include "machine.h"
#include "runner.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SCOPE_GROUP = 1, END_OF_TRANSMISSION = 4 };

static const struct stream_kind exec_kind;

static struct exec *exec_of(struct stream *stream)
{
	return CONTAINER_OF(stream, struct exec, stream);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void close_child_fds(struct exec *exec)
{
	int *fds = exec->child_fds;

	if (fds[2] != fds[1] && fds[2] != fds[0])
		close_fd(&fds[2]);
	if (fds[1] != fds[0])
		close_fd(&fds[1]);
	close_fd(&fds[0]);
	fds[1] = fds[2] = -1;
}

/* A pipe whose end `ours` (0 reads, 1 writes) does not block. */
static int open_pipe(int ours, int *our_fd, int *child_fd)
{
	int fds[2];

	if (pipe2(fds, O_CLOEXEC) != 0)
		return -errno;
	(void)fcntl(fds[ours], F_SETFL, O_NONBLOCK);
	*our_fd = fds[ours];
	*child_fd = fds[1 - ours];
	return 0;
}

static int open_no_input(int *child_fd)
{
	int ours = -1;

	*child_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	if (*child_fd >= 0)
		return 0;
	int status = open_pipe(1, &ours, child_fd);
	if (status == 0)
		close(ours);
	return status;
}

static int open_pipes(struct exec *exec)
{
	int status = exec->has_input ? open_pipe(1, &exec->in.fd, &exec->child_fds[0]) : open_no_input(&exec->child_fds[0]);

	if (status == 0)
		status = open_pipe(0, &exec->out.fd, &exec->child_fds[1]);
	if (status == 0)
		status = open_pipe(0, &exec->err.fd, &exec->child_fds[2]);
	return status;
}

static int open_tty(struct exec *exec, const struct exec_request *request)
{
	int fds[2];
	int status = open_terminal(fds, request->rows, request->cols);

	if (status != 0)
		return status;
	exec->out.fd = fds[0];
	exec->out.is_pipe = false;
	exec->child_fds[0] = exec->child_fds[1] = exec->child_fds[2] = fds[1];
	/* A second descriptor, so that each direction has its own end. */
	exec->in.fd = fcntl(fds[0], F_DUPFD_CLOEXEC, 3);
	return exec->in.fd < 0 ? -errno : 0;
}

static int open_flows(struct session *session, struct exec *exec, const struct exec_request *request)
{
	int status = exec->tty ? open_tty(exec, request) : open_pipes(exec);

	if (status != 0)
		return status;
	if (!session_watch(session, exec->out.fd, &exec->out.source, EPOLLIN) ||
	    (exec->err.fd >= 0 && !session_watch(session, exec->err.fd, &exec->err.source, EPOLLIN)) ||
	    (exec->in.fd >= 0 && !session_watch(session, exec->in.fd, &exec->in.source, EPOLLOUT)))
		return -errno;
	return 0;
}

int exec_open(struct session *session, uint32_t id, const uint8_t *payload, uint32_t size)
{
	struct exec_request request;
	int status = exec_request_parse(&request, payload, size);

	if (status == -EPROTO)
		return status;
	struct exec *exec = status == 0 ? calloc(1, sizeof *exec) : NULL;
	if (exec == NULL) {
		out_error(session, id, status == 0 ? ENOMEM : -status, "process");
		exec_request_free(&request);
		return 0;
	}
	exec->tty = (request.flags & EXEC_TTY) != 0;
	exec->has_input = (request.flags & EXEC_STDIN) != 0 || exec->tty;
	bool wants_runner = (request.flags & EXEC_WARM) != 0;
	exec->credit = request.window < WINDOW_MAX ? request.window : WINDOW_MAX;
	exec->child_fds[0] = exec->child_fds[1] = exec->child_fds[2] = -1;
	output_init(&exec->out, -1, F_STDOUT, true);
	output_init(&exec->err, -1, F_STDERR, true);
	input_init(&exec->in, -1);
	stream_add(session, &exec->stream, &exec_kind, id);
	status = open_flows(session, exec, &request);
	exec_request_free(&request);
	exec->request = status == 0 ? malloc(size) : NULL;
	if (exec->request == NULL) {
		out_error(session, id, status == 0 ? ENOMEM : -status, exec->tty ? "terminal" : "pipe");
		stream_end(&exec->stream);
		return 0;
	}
	memcpy(exec->request, payload, size);
	exec->request_size = size;
	if (!wants_runner || !runner_offer(session, exec))
		exec_start_cold(session, exec);
	return 0;
}

void exec_start_cold(struct session *session, struct exec *exec)
{
	struct exec_request request;
	struct launch launch = {.request = &request, .die_with_parent = !session->config.own_pid_namespace,
				.machine = session->config.machine ? &session->config : NULL};
	int status = exec_request_parse(&request, exec->request, exec->request_size);

	if (status != 0) {
		out_error(session, exec->stream.id, -status, "process");
		stream_end(&exec->stream);
		return;
	}
	memcpy(launch.fds, exec->child_fds, sizeof launch.fds);
	pid_t pid = spawn(&launch);
	exec_request_free(&request);
	if (pid < 0) {
		out_error(session, exec->stream.id, launch.error, launch.what);
		stream_end(&exec->stream);
		return;
	}
	exec_started(session, exec, pid, false);
}

static void send_signal(struct session *session, struct exec *exec, uint32_t signo, uint32_t scope)
{
	pid_t group = exec->pid;

	if (signo == 0 || signo > 64)
		return;
	/* The runner named this pid, and it shares the sandbox with hostile code: it may be a stranger's. */
	if (exec->warm && !session->config.own_pid_namespace && !is_descendant(exec->pid))
		return;
	if (scope != SCOPE_GROUP) {
		kill(exec->pid, (int)signo);
		return;
	}
	/* On a terminal the group is the one in the foreground, as for Ctrl-C. */
	if (exec->tty && exec->out.fd >= 0 && (ioctl(exec->out.fd, TIOCGPGRP, &group) != 0 || group <= 1))
		group = exec->pid;
	if (kill(-group, (int)signo) != 0)
		kill(exec->pid, (int)signo);
}

void exec_started(struct session *session, struct exec *exec, pid_t pid, bool warm)
{
	uint8_t payload[8];

	close_child_fds(exec);
	free(exec->request);
	exec->request = NULL;
	exec->pid = pid;
	exec->warm = warm;
	put_u32(payload, (uint32_t)pid);
	put_u32(payload + 4, warm);
	out_frame(session, F_STARTED, exec->stream.id, payload, sizeof payload);
	for (uint32_t i = 0; i < exec->n_early; i += 2)
		send_signal(session, exec, exec->early_signals[i], exec->early_signals[i + 1]);
}

static int on_signal(struct session *session, struct exec *exec, struct cursor *payload)
{
	uint32_t signo = get_u32(payload);
	uint32_t scope = get_u32(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	if (exec->exited)
		return 0;
	runner_pump(session);
	if (exec->pid != 0) {
		send_signal(session, exec, signo, scope);
	} else if (exec->n_early + 2 <= sizeof exec->early_signals / sizeof exec->early_signals[0]) {
		exec->early_signals[exec->n_early++] = signo;
		exec->early_signals[exec->n_early++] = scope;
	}
	return 0;
}

static int on_resize(struct exec *exec, struct cursor *payload)
{
	uint16_t rows = get_u16(payload);
	uint16_t cols = get_u16(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	if (exec->tty && exec->out.fd >= 0)
		resize_terminal(exec->out.fd, rows, cols);
	return 0;
}

static int on_credit(struct exec *exec, struct cursor *payload)
{
	uint32_t bytes = get_u32(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	exec->credit += bytes;
	if (exec->credit > WINDOW_MAX)
		exec->credit = WINDOW_MAX;
	return 0;
}

static int on_stdin_eof(struct exec *exec, struct cursor *payload)
{
	uint8_t end = END_OF_TRANSMISSION;
	int status = 0;

	if (!cursor_done(payload))
		return -EPROTO;
	/* A terminal has no end of file: the line discipline makes one of this byte. */
	if (exec->tty && !exec->in.at_end)
		status = input_take_own(&exec->in, &end, 1);
	exec->in.at_end = true;
	return status;
}

int exec_control(struct session *session, struct stream *stream, const struct frame *frame, struct cursor *payload)
{
	struct exec *exec = exec_of(stream);

	switch (frame->type) {
	case F_SIGNAL:
		return on_signal(session, exec, payload);
	case F_RESIZE:
		return on_resize(exec, payload);
	case F_CREDIT:
		return on_credit(exec, payload);
	case F_STDIN_EOF:
		return on_stdin_eof(exec, payload);
	default:
		return -EPROTO;
	}
}

static int exec_data(struct session *session, struct stream *stream, uint8_t type, const uint8_t *bytes, uint32_t size)
{
	struct exec *exec = exec_of(stream);

	(void)session;
	if (type != F_STDIN)
		return -EPROTO;
	return input_take(&exec->in, bytes, size);
}

static bool pump_output(struct session *session, struct exec *exec, struct output *output)
{
	return exec->stream.let_go ? output_discard(session, output)
			    : output_pump(session, exec->stream.id, output, &exec->credit);
}

static bool exec_pump(struct session *session, struct stream *stream)
{
	struct exec *exec = exec_of(stream);

	if (exec->has_input && input_pump(session, stream->id, &exec->in) && exec->in.at_end && !exec->tty)
		session_close(session, &exec->in.fd);
	bool more = pump_output(session, exec, &exec->out);
	more |= pump_output(session, exec, &exec->err);
	if (exec->exited && exec->out.fd < 0 && exec->err.fd < 0) {
		if (!exec->stream.let_go)
			out_frame(session, F_EXIT, stream->id, exec->exit_payload, exec->exit_size);
		stream_end(stream);
		return false;
	}
	return more;
}

static void exec_destroy(struct session *session, struct stream *stream)
{
	struct exec *exec = exec_of(stream);

	runner_forget(session, exec);
	output_close(session, &exec->out);
	output_close(session, &exec->err);
	input_free(session, &exec->in);
	close_child_fds(exec);
	free(exec->request);
}

static struct allowances exec_allowances(const struct stream *stream)
{
	const struct exec *exec = (const struct exec *)(const void *)stream;

	return (struct allowances){exec->credit, exec->in.allowance};
}

void exec_let_go(struct session *session, struct stream *stream, bool and_kill)
{
	struct exec *exec = exec_of(stream);

	stream->let_go = true;
	exec->in.at_end = true;
	exec->out.ready = exec->err.ready = true; /* there may be what no credit allowed to send */
	if (!and_kill || exec->exited)
		return;
	if (exec->pid != 0) {
		send_signal(session, exec, SIGKILL, SCOPE_GROUP);
		return;
	}
	/* Before its start only one signal matters. */
	exec->early_signals[0] = SIGKILL;
	exec->early_signals[1] = SCOPE_GROUP;
	exec->n_early = 2;
}

static const struct stream_kind exec_kind = {
	.allowances = exec_allowances,
	.control = exec_control,
	.data = exec_data,
	.pump = exec_pump,
	.destroy = exec_destroy,
};

bool exec_any(const struct session *session)
{
	for (const struct stream *stream = session->streams; stream != NULL; stream = stream->next)
		if (stream->kind == &exec_kind && !stream->ended)
			return true;
	return false;
}

static uint64_t microseconds(struct timeval time)
{
	return (uint64_t)time.tv_sec * 1000000 + (uint64_t)time.tv_usec;
}

static void exec_exited(struct session *session, struct exec *exec, int status, const struct rusage *usage)
{
	uint8_t *payload = exec->exit_payload;

	exec->exited = true;
	put_u32(payload, WIFEXITED(status) ? (uint32_t)WEXITSTATUS(status) : 0);
	put_u32(payload + 4, WIFSIGNALED(status) ? (uint32_t)WTERMSIG(status) : 0);
	put_u64(payload + 8, usage == NULL ? 0 : microseconds(usage->ru_utime));
	put_u64(payload + 16, usage == NULL ? 0 : microseconds(usage->ru_stime));
	put_u64(payload + 24, usage == NULL ? 0 : (uint64_t)usage->ru_maxrss * 1024);
	exec->exit_size = 32;
	/* The host sees how often a shared kernel did this by itself; a machine's has to be asked, from inside. */
	if (session->config.machine && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
		put_u32(payload + exec->exit_size, memory_kills());
		exec->exit_size = sizeof exec->exit_payload;
	}
	output_drain(session, &exec->out);
	output_drain(session, &exec->err);
}

bool exec_reaped(struct session *session, pid_t pid, int status, const struct rusage *usage)
{
	for (struct stream *stream = session->streams; stream != NULL; stream = stream->next) {
		struct exec *exec = exec_of(stream);

		if (stream->kind == &exec_kind && !stream->ended && exec->pid == pid && !exec->exited &&
		    (usage != NULL || exec->warm)) {
			exec_exited(session, exec, status, usage);
			return true;
		}
	}
	return false;
}
