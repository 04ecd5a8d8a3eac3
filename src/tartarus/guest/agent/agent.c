/* The session: one loop over everything that can happen, one table of what the host can ask. */
#include "session.h"

#include "descriptors.h"
#include "exec.h"
#include "files.h"
#include "fixup.h"
#include "forward.h"
#include "kill.h"
#include "listen.h"
#include "machine.h"
#include "quiet.h"
#include "runner.h"
#include "signals.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_SETUP = 125, EVENTS = 32, FEATURE_RUNNER = 1, FEATURE_OWN_PIDS = 2, SOCKET_BUFFER = 1 << 20,
       PING_MAX = 16 << 10, HELLO_RESUME = 1 };

int64_t monotonic_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

bool session_watch(struct session *session, int fd, struct source *source, uint32_t events)
{
	struct epoll_event event = {.events = events | EPOLLET, .data.ptr = source};

	return epoll_ctl(session->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

void session_close(struct session *session, int *fd)
{
	if (*fd < 0)
		return;
	(void)epoll_ctl(session->epoll_fd, EPOLL_CTL_DEL, *fd, NULL);
	close(*fd);
	*fd = -1;
}

void stream_add(struct session *session, struct stream *stream, const struct stream_kind *kind, uint32_t id)
{
	stream->kind = kind;
	stream->id = id;
	stream->opened_by = session->opening;
	stream->next = session->streams;
	session->streams = stream;
	session->n_streams++;
}

void stream_end(struct stream *stream)
{
	stream->ended = true;
}

static struct stream *stream_find(struct session *session, uint32_t id)
{
	for (struct stream *stream = session->streams; stream != NULL; stream = stream->next)
		if (stream->id == id && !stream->ended)
			return stream;
	return NULL;
}

static void free_stream(struct session *session, struct stream *stream)
{
	if (stream->kind->destroy != NULL)
		stream->kind->destroy(session, stream);
	free(stream);
	session->n_streams--;
}

static void sweep_streams(struct session *session, bool all)
{
	struct stream **link = &session->streams;

	while (*link != NULL) {
		struct stream *stream = *link;

		if (!stream->ended && !all) {
			link = &stream->next;
			continue;
		}
		*link = stream->next;
		free_stream(session, stream);
	}
}

static void say_ready(struct session *session)
{
	uint8_t ready[12];

	put_u32(ready, PROTOCOL_VERSION);
	put_u32(ready + 4, (uint32_t)getpid());
	put_u32(ready + 8, (runner_present(session) ? FEATURE_RUNNER : 0) |
				   (session->config.own_pid_namespace ? FEATURE_OWN_PIDS : 0));
	out_frame(session, F_READY, 0, ready, sizeof ready);
}

/* Who came in last has said whose host it is: what is for it may leave. */
static void hear_host(struct session *session)
{
	if (!session->awaited)
		return;
	session->awaited = false;
	session->out.blocked = false;
}

static int on_hello(struct session *session, struct cursor *payload)
{
	uint32_t version = get_u32(payload);
	uint32_t flags = 0, last_stream = 0;

	if (!cursor_done(payload)) {
		flags = get_u32(payload);
		last_stream = get_u32(payload);
	}
	if (!cursor_done(payload) || version != PROTOCOL_VERSION || (flags & ~(uint32_t)HELLO_RESUME) != 0)
		return -EPROTO;
	if ((flags & HELLO_RESUME) != 0) {
		int status = quiet_resume(session, last_stream);

		if (status == 0) {
			hear_host(session);
			say_ready(session);
			quiet_report(session, 0);
		}
		return status;
	}
	/* A second time where the guest was restored from a snapshot: another host end begins anew. */
	if (session->n_streams > 0 && !session->config.machine)
		return -EPROTO;
	/* A restored machine meets a new host, which knows nothing of what was under way. */
	if (session->greeted) {
		sweep_streams(session, true);
		session->deadline_ms = session->stop_ms = session->n_stops = 0;
		session->out.head = session->out.tail = 0;
		session->quiet = false;
	}
	hear_host(session);
	session->greeted = true;
	session->last_stream = 0;
	say_ready(session);
	return 0;
}

static int on_shutdown(struct session *session, struct cursor *payload)
{
	uint32_t grace_ms = get_u32(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	if (grace_ms == 0) {
		session->over = true;
		return 0;
	}
	session->quiet = false;
	signal_everybody(session, SIGTERM);
	session->deadline_ms = monotonic_ms() + grace_ms;
	session->child_ended = true; /* perhaps nobody is there to wait for */
	return 0;
}

static int on_stop(struct session *session, struct cursor *payload)
{
	uint32_t grace_ms = get_u32(payload), signo = get_u32(payload);

	if (!cursor_done(payload) || signo == 0 || signo > 64)
		return -EPROTO;
	signal_everybody(session, (int)signo);
	/* Whoever stands still could not end. */
	signal_everybody(session, SIGCONT);
	session->stop_ms = monotonic_ms() + grace_ms;
	session->n_stops++;
	session->child_ended = true; /* perhaps nobody is there to wait for */
	return 0;
}

/* Frames of stream 0: the session itself. */
static int session_frame(struct session *session, const struct frame *frame, const uint8_t *bytes,
			 struct cursor *payload)
{
	switch (frame->type) {
	case F_SHUTDOWN:
		return on_shutdown(session, payload);
	case F_STOP:
		return on_stop(session, payload);
	case F_PING:
		if (frame->length > PING_MAX)
			return -EPROTO;
		out_frame(session, F_PONG, 0, bytes, frame->length);
		return 0;
	case F_FREEZE:
		return serve_freeze(session, payload);
	case F_QUIESCE:
		return quiet_begin(session, payload);
	case F_GO_ON:
		return quiet_end(session, payload);
	default:
		return -EPROTO;
	}
}

/* What the host can ask for, other than EXEC. Each begins a stream of its own. */
static int (*const services[])(struct session *, uint32_t, struct cursor *) = {
	[F_STAT] = serve_stat,     [F_LIST] = serve_list,   [F_READ] = serve_read,   [F_WRITE] = serve_write,
	[F_MKDIR] = serve_mkdir,   [F_MOVE] = serve_move,   [F_REMOVE] = serve_remove, [F_WATCH] = serve_watch,
	[F_CONNECT] = serve_connect, [F_FIXUP] = serve_fixup,
};

static bool opens_stream(uint8_t type)
{
	return type == F_EXEC || (type < sizeof services / sizeof services[0] && services[type] != NULL);
}

static int open_stream(struct session *session, const struct frame *frame, const uint8_t *bytes,
		       struct cursor *payload)
{
	/* Host ids only grow, so one that was used before can't be mistaken for a new one. */
	if (frame->stream <= session->last_stream)
		return -EPROTO;
	session->last_stream = frame->stream;
	session->opening = frame->type;
	if (session->n_streams >= STREAMS_MAX) {
		out_error(session, frame->stream, EMFILE, "streams");
		return 0;
	}
	if (frame->type == F_EXEC)
		return exec_open(session, frame->stream, bytes, frame->length);
	return services[frame->type](session, frame->stream, payload);
}

static int on_control(void *context, const struct frame *frame, const uint8_t *bytes)
{
	struct session *session = context;
	struct cursor payload = cursor_over(bytes, frame->length);

	if (frame->type == F_HELLO)
		return on_hello(session, &payload);
	if (!session->greeted)
		return -EPROTO;
	/* Without a greeting it is the host before: its monitor broke the connection, and it never noticed. */
	hear_host(session);
	if (frame->stream == 0)
		return session_frame(session, frame, bytes, &payload);
	if (session->quiet && frame->type != F_FIXUP)
		return -EPROTO;
	if (opens_stream(frame->type))
		return open_stream(session, frame, bytes, &payload);
	struct stream *stream = stream_find(session, frame->stream);
	/* It ended while the host still wrote to it. */
	if (stream == NULL)
		return frame->stream <= session->last_stream ? 0 : -EPROTO;
	if (frame->type == F_CANCEL && frame->length == 0 && stream->kind->control != exec_control) {
		stream_end(stream);
		return 0;
	}
	return stream->kind->control == NULL ? -EPROTO : stream->kind->control(session, stream, frame, &payload);
}

static int on_data(void *context, const struct frame *frame, const uint8_t *bytes, uint32_t size)
{
	struct session *session = context;
	struct stream *stream = stream_find(session, frame->stream);

	if (session->quiet)
		return -EPROTO;
	if (session->greeted)
		hear_host(session);
	if (stream == NULL)
		return session->greeted && frame->stream <= session->last_stream ? 0 : -EPROTO;
	return stream->kind->data == NULL ? -EPROTO : stream->kind->data(session, stream, frame->type, bytes, size);
}

static void read_channel(struct session *session)
{
	static const struct frame_sink sink = {on_control, on_data};
	static uint8_t bytes[READ_SIZE];
	ssize_t n = read(session->config.channel_fd, bytes, sizeof bytes);

	if (n < 0 && errno == EINTR)
		return;
	if (n < 0 && errno == EAGAIN) {
		session->channel_readable = false;
		return;
	}
	if (n <= 0 && listen_lost(session))
		return;
	/* A machine's port says so while no host has it open; the next one greets anew. */
	if (n == 0 && session->config.machine) {
		session->channel_readable = false;
		decoder_free(&session->decoder); /* half a frame of one host is no beginning of another's */
		return;
	}
	if (n <= 0 || decoder_feed(&session->decoder, bytes, (size_t)n, &sink, session) != 0)
		session->over = true;
}

static void channel_ready(struct session *session, struct source *source, uint32_t events)
{
	(void)source;
	if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0)
		session->channel_readable = true;
	if ((events & EPOLLOUT) != 0 && !session->awaited)
		session->out.blocked = false;
}

static void signal_ready(struct session *session, struct source *source, uint32_t events)
{
	struct signalfd_siginfo info[4];

	(void)source;
	(void)events;
	while (read(session->signal_fd, info, sizeof info) > 0)
		session->child_ended = true;
}

static void reap(struct session *session)
{
	struct rusage usage;
	int status;
	pid_t pid;

	session->child_ended = false;
	/* What the runner said before it or a child of its ended must be known first. */
	runner_pump(session);
	while ((pid = wait4(-1, &status, WNOHANG, &usage)) > 0)
		exec_reaped(session, pid, status, &usage);
	session->childless = pid < 0 && errno == ECHILD;
}

/* Let every stream do some work. True when one could do more at once. */
static bool pump_streams(struct session *session)
{
	bool more = false;

	for (struct stream *stream = session->streams; stream != NULL; stream = stream->next)
		if (!stream->ended && stream->kind->pump != NULL)
			more |= stream->kind->pump(session, stream);
	return more;
}

static int next_timeout(const struct session *session)
{
	int64_t first = session->deadline_ms;
	int64_t stop_ms = session->quiet ? 0 : session->stop_ms; /* while it is quiet, nobody is told */

	if (first == 0 || (stop_ms != 0 && stop_ms < first))
		first = stop_ms;
	if (first == 0)
		return -1;
	int64_t left = first - monotonic_ms();
	return left < 0 ? 0 : left > 1000000 ? 1000000 : (int)left;
}

/* Has everybody ended, and does the host know all of it? */
static bool all_done(const struct session *session)
{
	return session->childless && !exec_any(session) && !out_busy(session) && session->out.head == session->out.tail;
}

/* Nobody is left whom a STOP waits for, or its grace is over. */
static void tell_stopped(struct session *session)
{
	bool ended = all_done(session);

	if (session->quiet || session->stop_ms == 0 || (!ended && monotonic_ms() < session->stop_ms))
		return;
	session->stop_ms = 0;
	for (; session->n_stops > 0; session->n_stops--)
		out_u32(session, F_STOPPED, 0, ended);
	out_flush(session);
}

static void serve(struct session *session)
{
	struct epoll_event events[EVENTS];
	bool more = true;

	while (!session->over) {
		int n = epoll_wait(session->epoll_fd, events, EVENTS, more ? 0 : next_timeout(session));

		for (int i = 0; i < n; i++) {
			struct source *source = events[i].data.ptr;
			source->ready(session, source, events[i].events);
		}
		if (session->channel_readable && !out_busy(session))
			read_channel(session);
		if (!session->quiet) {
			runner_pump(session);
			if (session->child_ended)
				reap(session);
		}
		bool was_busy = out_busy(session);
		more = !session->quiet && !session->awaited && pump_streams(session);
		was_busy |= out_busy(session);
		/* Before the answers leave: what a stream held is given back when the host learns of its end. */
		sweep_streams(session, false);
		out_flush(session);
		more = (more || was_busy || session->channel_readable) && !out_busy(session);
		tell_stopped(session);
		if (session->deadline_ms != 0 && (all_done(session) || monotonic_ms() >= session->deadline_ms))
			session->over = true;
	}
}

static bool take_signals(struct session *session)
{
	sigset_t all, child;

	sigfillset(&all);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	signals_to_default();
	sigprocmask(SIG_SETMASK, &all, NULL);
	session->signal_fd = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	session->signal_source.ready = signal_ready;
	return session->signal_fd >= 0 && session_watch(session, session->signal_fd, &session->signal_source, EPOLLIN);
}

static bool set_up(struct session *session)
{
	int fd = session->config.channel_fd;
	int size = SOCKET_BUFFER;

	prctl(PR_SET_DUMPABLE, 0);
	if (!session->config.own_pid_namespace) {
		prctl(PR_SET_CHILD_SUBREAPER, 1);
		/* Were it stopped when the host dies, it could never see the channel's end. */
		prctl(PR_SET_PDEATHSIG, SIGCONT);
	}
	umask(022);
	fill_standard_fds();
	close_others(&session->config);
	session->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (session->epoll_fd < 0)
		return false;
	if (fd >= 0 && (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0 || fcntl(fd, F_SETFL, O_NONBLOCK) != 0))
		return false;
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
	session->channel_source.ready = channel_ready;
	session->channel_readable = fd >= 0;
	session->child_ended = true;
	session->out.splice_pipe = -1;
	session->out.cannot_splice = session->config.machine;
	act_as_user(&session->config);
	if (fd >= 0 && !session_watch(session, fd, &session->channel_source, EPOLLIN | EPOLLOUT | EPOLLRDHUP))
		return false;
	return listen_attach(session) && take_signals(session) && runner_attach(session);
}

int agent_main(const struct agent_config *config)
{
	static struct session session;

	session.config = *config;
	if (!set_up(&session))
		return EXIT_SETUP;
	serve(&session);
	sweep_streams(&session, true);
	kill_everybody(&session);
	return 0;
}
