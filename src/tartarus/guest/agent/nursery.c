/*
 * The nursery stands where a template's guests will be born: in the template's user, mount and pid
 * namespaces, with nothing of the host's around it. The host drives it over one SOCK_SEQPACKET
 * socket (fd 3):
 *
 *   TRUN seq program        run a syscall program in the nursery itself
 *   TFRK seq                go on as pid 1 of the pid namespace that an earlier TRUN unshared
 *   TZYG seq program argv env  run a program in a child, then start the template's warm interpreter there;
 *                           fds: its control socket, its log
 *   TCLN seq flags program  fork a guest; fds: its channel, the agent's executable, others
 *   TUSR seq span n n       make a user namespace for a guest: its ids, inotify instances and watches
 *   TEND seq pid            kill a guest, all below it and all orphans (where no pid namespace does it)
 *
 * Each is answered by TCLD {seq, errno, pid or failed step}, with a pidfd where a process began, or the namespace.
 * When the socket closes (the daemon ended, however it ended) the nursery ends, and the kernel ends
 * every process of its pid namespace with it.
 */
#include "nursery.h"

#include "agent.h"
#include "kill.h"
#include "packet.h"
#include "program.h"
#include "signals.h"
#include "userns.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	FIRST_PASSED_FD = 3,
	FRAME_BOOT_FAILED = 0x82,
};

static bool shared_pids;
static int signal_fd = -1;
static pid_t known_children[8192];
static size_t n_known;
/* The warm interpreters among them; one that is replaced may still be ending. */
static pid_t zygotes[8];

static long sys_close_range(unsigned first, unsigned last)
{
#ifdef SYS_close_range
	return syscall(SYS_close_range, first, last, 0);
#else
	return syscall(436, first, last, 0);
#endif
}

/* Fork with namespaces: the child returns 0 like fork(2), and *pidfd names it for the parent. */
static pid_t clone_process(uint64_t flags, int *pidfd)
{
	return (pid_t)syscall(SYS_clone, flags | CLONE_PIDFD | SIGCHLD, 0, pidfd, 0, 0);
}

/* In a new child: the passed descriptors become 3, 4, 5 …, and no other stays open above 2. */
static void keep_only(struct request *request)
{
	/* Two moves, because a passed descriptor may already stand where another one must go. */
	int high[FDS_MAX];
	for (size_t i = 0; i < request->n_fds; i++)
		high[i] = fcntl(request->fds[i], F_DUPFD, FIRST_PASSED_FD + 2 * (int)FDS_MAX);
	for (size_t i = 0; i < request->n_fds; i++) {
		int target = FIRST_PASSED_FD + (int)i;
		if (high[i] < 0 || dup2(high[i], target) < 0)
			_exit(125);
		request->fds[i] = target;
	}
	sys_close_range((unsigned)(FIRST_PASSED_FD + (int)request->n_fds), ~0U);
}

static void reset_signals(void)
{
	sigset_t none;
	sigemptyset(&none);
	signals_to_default();
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static void report_boot_failure(const struct program_failure *failure)
{
	struct __attribute__((packed)) {
		uint32_t length;
		uint8_t type, flags;
		uint16_t zero;
		uint32_t stream, step, error;
	} frame = {8, FRAME_BOOT_FAILED, 0, 0, 0, failure->step, failure->error};
	ssize_t ignored = write(FIRST_PASSED_FD, &frame, sizeof frame);
	(void)ignored;
}

static _Noreturn void become_guest(struct request *request, unsigned char *program, size_t size, bool own_pids)
{
	struct program_failure failure;

	reset_signals();
	keep_only(request);
	if (program_run(program, size, request->fds, request->n_fds, &failure) != 0) {
		report_boot_failure(&failure);
		_exit(125);
	}
	munmap(request->bytes, PACKET_MAX);
	sys_close_range(FIRST_PASSED_FD + 1, ~0U);
	struct agent_config config = {
		.channel_fd = FIRST_PASSED_FD, .listen_fd = -1, .runner_fd = -1, .group_fd = -1,
		.own_pid_namespace = own_pids};
	_exit(agent_main(&config));
}

static bool can_remember(void)
{
	return !shared_pids || n_known < sizeof known_children / sizeof known_children[0];
}

static void remember(pid_t pid)
{
	if (shared_pids && can_remember())
		known_children[n_known++] = pid;
}

static void remember_zygote(pid_t pid)
{
	for (size_t i = 0; shared_pids && i < sizeof zygotes / sizeof zygotes[0]; i++)
		if (zygotes[i] == 0) {
			zygotes[i] = pid;
			return;
		}
}

static bool is_known(pid_t pid)
{
	for (size_t i = 0; i < n_known; i++)
		if (known_children[i] == pid)
			return true;
	return false;
}

static void forget(pid_t pid)
{
	for (size_t i = 0; i < n_known; i++)
		if (known_children[i] == pid) {
			known_children[i] = known_children[--n_known];
			return;
		}
}

/* Whether a warm interpreter has died since the last call. */
static bool zygote_died(void)
{
	bool died = false;

	for (size_t i = 0; i < sizeof zygotes / sizeof zygotes[0]; i++) {
		siginfo_t info = {.si_pid = 0};
		if (zygotes[i] == 0)
			continue;
		int result = waitid(P_PID, (id_t)zygotes[i], &info, WEXITED | WNOHANG | WNOWAIT);
		if ((result == 0 && info.si_pid == zygotes[i]) || (result != 0 && errno == ECHILD)) {
			zygotes[i] = 0;
			died = true;
		}
	}
	return died;
}

static size_t list_children(pid_t *found, size_t room, bool all)
{
	size_t count = 0;
	FILE *file = fopen("/proc/thread-self/children", "re");
	int pid;

	if (file == NULL)
		return 0;
	while (count < room && fscanf(file, "%d", &pid) == 1)
		if (all || !is_known(pid))
			found[count++] = pid;
	fclose(file);
	return count;
}

/*
 * Kill children that we did not start (`all`: and those that we did) with all below them. Returns how many.
 *
 * The guests that a warm interpreter made become our children at the very moment it dies. They go on:
 * when one has died since we looked last, whoever is new to us is taken over instead.
 */
static size_t kill_children(bool all)
{
	static pid_t found[8192];
	const size_t room = sizeof found / sizeof found[0];
	size_t count = list_children(found, room, all);

	if (!all && zygote_died()) {
		count = list_children(found, room, false);
		for (size_t i = 0; i < count; i++)
			remember(found[i]);
		return 0;
	}
	for (size_t i = 0; i < count; i++) {
		kill(found[i], SIGSTOP);
		kill_descendants(found[i]);
		kill(found[i], SIGKILL);
	}
	return count;
}

static void reap(void)
{
	pid_t pid;

	/* First, because it must find out whether a warm interpreter has died. */
	if (shared_pids)
		kill_children(false);
	while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
		forget(pid);
}

/* Ends every descendant where no pid namespace does it for us: orphans come to us, one layer at a time. */
static void end_everything(void)
{
	if (!shared_pids)
		return;
	/* Guests end by themselves when the host closes their channels; give them no more than a moment. */
	for (int round = 0; round < 2000; round++) {
		size_t left = kill_children(round >= 200);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (left == 0 && waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD)
			return;
		poll(NULL, 0, 1);
	}
}

static void handle_clone(struct request *request, uint32_t seq)
{
	int pidfd = -1;

	if (request->size < 20 || request->n_fds < 2) {
		packet_answer(seq, EINVAL, 0, -1);
		return;
	}
	uint64_t flags;
	memcpy(&flags, request->bytes + 8, sizeof flags);
	uint32_t length = u32_at(request->bytes + 16);
	if (length != request->size - 20) {
		packet_answer(seq, EINVAL, 0, -1);
		return;
	}
	if (!can_remember()) {
		packet_answer(seq, EAGAIN, 0, -1);
		return;
	}
	pid_t pid = clone_process(flags, &pidfd);
	if (pid == 0)
		become_guest(request, request->bytes + 20, length, (flags & CLONE_NEWPID) != 0);
	if (pid < 0) {
		packet_answer(seq, (uint32_t)errno, 0, -1);
		return;
	}
	remember(pid);
	packet_answer(seq, 0, pid, pidfd);
	close(pidfd);
}

static void handle_zygote(struct request *request, uint32_t seq)
{
	static char pool[64 * 1024];
	char *argv[STRINGS_MAX], *envp[STRINGS_MAX];
	unsigned char *at = request->bytes + 8, *end = request->bytes + request->size;
	unsigned char *program = at + 4;
	uint32_t program_size = request->size >= 12 ? u32_at(at) : UINT32_MAX;
	struct program_failure failure;
	int pidfd = -1;

	if (program_size > (size_t)(end - at) - 4) {
		packet_answer(seq, EINVAL, 0, -1);
		return;
	}
	at = program + program_size;
	if (request->n_fds != 2 || !read_strings(&at, end, argv, pool, sizeof pool / 2) ||
	    !read_strings(&at, end, envp, pool + sizeof pool / 2, sizeof pool / 2) || argv[0] == NULL) {
		packet_answer(seq, EINVAL, 0, -1);
		return;
	}
	pid_t pid = clone_process(0, &pidfd);
	if (pid == 0) {
		reset_signals();
		keep_only(request);
		dup2(4, 1);
		dup2(4, 2);
		close(4);
		if (program_run(program, program_size, request->fds, 0, &failure) != 0) {
			dprintf(2, "confining the interpreter failed at step %u: %s\n", failure.step,
				strerror((int)failure.error));
			_exit(125);
		}
		execve(argv[0], argv, envp);
		dprintf(2, "can't execute %s: %s\n", argv[0], strerror(errno));
		_exit(127);
	}
	if (pid < 0) {
		packet_answer(seq, (uint32_t)errno, 0, -1);
		return;
	}
	remember(pid);
	remember_zygote(pid);
	packet_answer(seq, 0, pid, pidfd);
	close(pidfd);
}

static void handle_run(struct request *request, uint32_t seq)
{
	struct program_failure failure;

	if (program_run(request->bytes + 8, request->size - 8, request->fds, request->n_fds, &failure) != 0)
		packet_answer(seq, failure.error, (int32_t)failure.step, -1);
	else
		packet_answer(seq, 0, 0, -1);
}

static void handle_fork(uint32_t seq)
{
	int pidfd = -1;
	pid_t pid = clone_process(0, &pidfd);

	if (pid == 0)
		return;
	if (pid < 0) {
		packet_answer(seq, (uint32_t)errno, 0, -1);
		return;
	}
	packet_answer(seq, 0, pid, pidfd);
	_exit(0);
}

/* The guest's agent is the subreaper of all it started, so everything is below it, or below us once it is dead. */
static void handle_end(struct request *request, uint32_t seq)
{
	if (!shared_pids || request->size != 12) {
		packet_answer(seq, EINVAL, 0, -1);
		return;
	}
	pid_t pid = (pid_t)u32_at(request->bytes + 8);
	if (pid > 1) {
		kill(pid, SIGSTOP);
		kill_descendants(pid);
		kill(pid, SIGKILL);
	}
	packet_answer(seq, 0, (int32_t)kill_children(false), -1);
}

static void handle_user_namespace(struct request *request, uint32_t seq)
{
	if (request->size != 20) {
		packet_answer(seq, EINVAL, 0, -1);
		return;
	}
	const unsigned char *at = request->bytes + 8;
	int fd = userns_make(u32_at(at), u32_at(at + 4), u32_at(at + 8));
	packet_answer(seq, fd < 0 ? (uint32_t)-fd : 0, 0, fd);
	if (fd >= 0)
		close(fd);
}

static void dispatch(struct request *request)
{
	if (request->size < 8)
		return;
	uint32_t seq = u32_at(request->bytes + 4);
	if (memcmp(request->bytes, "TCLN", 4) == 0)
		handle_clone(request, seq);
	else if (memcmp(request->bytes, "TRUN", 4) == 0)
		handle_run(request, seq);
	else if (memcmp(request->bytes, "TFRK", 4) == 0)
		handle_fork(seq);
	else if (memcmp(request->bytes, "TZYG", 4) == 0)
		handle_zygote(request, seq);
	else if (memcmp(request->bytes, "TUSR", 4) == 0)
		handle_user_namespace(request, seq);
	else if (memcmp(request->bytes, "TEND", 4) == 0)
		handle_end(request, seq);
	else
		packet_answer(seq, ENOSYS, 0, -1);
}

static bool open_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	if (sigprocmask(SIG_BLOCK, &set, NULL) != 0)
		return false;
	signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
	return signal_fd >= 0;
}

/* False when told to stop. */
static bool drain_signals(void)
{
	struct signalfd_siginfo info;
	bool go_on = true;

	while (read(signal_fd, &info, sizeof info) == (ssize_t)sizeof info)
		if (info.ssi_signo != SIGCHLD)
			go_on = false;
	reap();
	return go_on;
}

int nursery_main(int argc, char **argv)
{
	struct request request = {0};

	shared_pids = argc > 2 && strcmp(argv[2], "--shared-pids") == 0;
	if (shared_pids)
		prctl(PR_SET_CHILD_SUBREAPER, 1);
	request.bytes = mmap(NULL, PACKET_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (request.bytes == MAP_FAILED || !open_signals())
		return 125;
	for (;;) {
		struct pollfd fds[2] = {{CONTROL_FD, POLLIN, 0}, {signal_fd, POLLIN, 0}};
		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			break;
		if ((fds[1].revents & POLLIN) != 0 && !drain_signals())
			break;
		if (fds[0].revents == 0)
			continue;
		if (!packet_receive(&request))
			break;
		dispatch(&request);
		for (size_t i = 0; i < request.n_fds; i++)
			close(request.fds[i]);
	}
	end_everything();
	return 0;
}
