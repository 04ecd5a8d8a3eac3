/*
 * One request is on its way to the runner at a time; the others wait. Whatever goes wrong there
 * (refused, gone, nonsense), waiting programs start cold: a runner makes things faster, never
 * impossible. The runner shares the sandbox with hostile code, so what it says is checked too.
 */
#include "runner.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum answer_kind { STARTED = 1, EXITED = 2, REFUSED = 3 };
enum { ANSWER_SIZE = 12, REQUEST_MAX = 1 << 20, LENGTH_SIZE = 4 };

struct runner {
	struct source source;
	int fd;
	struct exec *waiting; /* the first one is being sent, or was sent and is not answered yet */
	uint32_t sent;        /* bytes of its request, length included */
	bool writable;
	uint8_t answer[ANSWER_SIZE];
	uint32_t answer_size;
};

static void runner_ready(struct session *session, struct source *source, uint32_t events)
{
	(void)session;
	if ((events & EPOLLOUT) != 0)
		CONTAINER_OF(source, struct runner, source)->writable = true;
}

bool runner_attach(struct session *session)
{
	int fd = session->config.runner_fd;

	if (fd < 0)
		return true;
	struct runner *runner = calloc(1, sizeof *runner);
	if (runner == NULL || fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
		free(runner);
		return false;
	}
	runner->source.ready = runner_ready;
	runner->fd = fd;
	runner->writable = true;
	session->runner = runner;
	return session_watch(session, fd, &runner->source, EPOLLIN | EPOLLOUT | EPOLLRDHUP);
}

bool runner_present(const struct session *session)
{
	return session->runner != NULL && session->runner->fd >= 0;
}

/* The first waiting exec was answered. */
static struct exec *take_first(struct runner *runner)
{
	struct exec *exec = runner->waiting;

	runner->waiting = exec->next_waiting;
	runner->sent = 0;
	return exec;
}

/* No more use of the runner: everything that waits for it starts cold. */
static void detach(struct session *session)
{
	struct runner *runner = session->runner;

	/* The structure stays: an event for it may be under way. */
	session_close(session, &runner->fd);
	while (runner->waiting != NULL)
		exec_start_cold(session, take_first(runner));
}

bool runner_offer(struct session *session, struct exec *exec)
{
	if (!runner_present(session) || exec->request_size > REQUEST_MAX)
		return false;
	struct exec **last = &session->runner->waiting;
	while (*last != NULL)
		last = &(*last)->next_waiting;
	*last = exec;
	exec->next_waiting = NULL;
	return true;
}

void runner_forget(struct session *session, struct exec *exec)
{
	if (session->runner == NULL)
		return;
	for (struct exec **link = &session->runner->waiting; *link != NULL; link = &(*link)->next_waiting)
		if (*link == exec) {
			*link = exec->next_waiting;
			return;
		}
}

/* The first piece of a request carries the program's descriptors. */
static ssize_t send_first(struct runner *runner, const struct exec *exec)
{
	uint8_t length[LENGTH_SIZE];
	struct iovec parts[2] = {{length, sizeof length}, {exec->request, exec->request_size}};
	union {
		char bytes[CMSG_SPACE(3 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2, .msg_control = control.bytes,
				 .msg_controllen = sizeof control.bytes};

	memset(&control, 0, sizeof control);
	put_u32(length, exec->request_size);
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(3 * sizeof(int));
	memcpy(CMSG_DATA(header), exec->child_fds, 3 * sizeof(int));
	return sendmsg(runner->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static ssize_t send_more(struct runner *runner, const struct exec *exec)
{
	uint8_t length[LENGTH_SIZE];

	put_u32(length, exec->request_size);
	if (runner->sent < LENGTH_SIZE)
		return send(runner->fd, length + runner->sent, LENGTH_SIZE - runner->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
	return send(runner->fd, exec->request + (runner->sent - LENGTH_SIZE),
		    exec->request_size - (runner->sent - LENGTH_SIZE), MSG_DONTWAIT | MSG_NOSIGNAL);
}

static bool all_sent(const struct runner *runner)
{
	return runner->sent == LENGTH_SIZE + runner->waiting->request_size;
}

static void send_waiting(struct session *session)
{
	struct runner *runner = session->runner;

	while (runner->fd >= 0 && runner->writable && runner->waiting != NULL && !all_sent(runner)) {
		ssize_t n = runner->sent == 0 ? send_first(runner, runner->waiting) : send_more(runner, runner->waiting);

		if (n >= 0)
			runner->sent += (uint32_t)n;
		else if (errno == EAGAIN)
			runner->writable = false;
		else if (errno != EINTR)
			detach(session);
	}
}

/* False when the runner talks nonsense. */
static bool take_answer(struct session *session)
{
	struct runner *runner = session->runner;
	struct cursor answer = cursor_over(runner->answer, ANSWER_SIZE);
	uint32_t kind = get_u32(&answer);
	pid_t pid = (pid_t)get_u32(&answer);
	uint32_t status = get_u32(&answer);

	bool answers = runner->waiting != NULL && all_sent(runner);

	if (kind == EXITED) {
		/* The child that should have become the program died before it did. */
		if (!exec_reaped(session, pid, (int)status, NULL) && answers)
			exec_start_cold(session, take_first(runner));
		return true;
	}
	if (!answers)
		return false;
	if (kind == STARTED && pid > 1 && pid != getpid())
		exec_started(session, take_first(runner), pid, true);
	else if (kind == REFUSED)
		exec_start_cold(session, take_first(runner));
	else
		return false;
	return true;
}

static void read_answers(struct session *session)
{
	struct runner *runner = session->runner;

	while (runner->fd >= 0) {
		ssize_t n = recv(runner->fd, runner->answer + runner->answer_size, ANSWER_SIZE - runner->answer_size,
				 MSG_DONTWAIT);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n <= 0) {
			detach(session);
			return;
		}
		runner->answer_size += (uint32_t)n;
		if (runner->answer_size < ANSWER_SIZE)
			continue;
		runner->answer_size = 0;
		if (!take_answer(session))
			detach(session);
	}
}

void runner_pump(struct session *session)
{
	if (session->runner == NULL)
		return;
	read_answers(session);
	send_waiting(session);
}
