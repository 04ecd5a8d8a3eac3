/*
 * Start a program: the child borrows this process's memory until execve (as posix_spawn does), so
 * a start costs no page table copy and its failure is known at once, without a pipe to carry it.
 */
#include "machine.h"
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static _Alignas(16) unsigned char child_stack[64 << 10];

static const char *search_path(char *const *envp)
{
	for (; *envp != NULL; envp++)
		if (strncmp(*envp, "PATH=", 5) == 0)
			return *envp + 5;
	return DEFAULT_PATH;
}

/* As execvpe(3), but with the path of `envp` and without its shell fallback. Returns an errno. */
static int exec_by_name(char *const *argv, char *const *envp)
{
	char candidate[PATH_MAX];
	const char *name = argv[0];
	size_t name_length = strlen(name);
	int found = ENOENT;

	if (strchr(name, '/') != NULL) {
		execve(name, argv, envp);
		return errno;
	}
	for (const char *at = search_path(envp);; at++) {
		size_t length = strcspn(at, ":");

		if (length + name_length + 2 <= sizeof candidate) {
			memcpy(candidate, at, length);
			candidate[length] = '/';
			/* An empty entry means the working directory. */
			memcpy(candidate + length + (length > 0), name, name_length + 1);
			/* An execve that finds no file has by then made an address space for it. */
			bool is_there = faccessat(AT_FDCWD, candidate, F_OK, 0) == 0;
			if (is_there)
				execve(candidate, argv, envp);
			if (errno == EACCES)
				found = EACCES;
			else if (errno == ENOENT && is_there)
				return ENOENT | INT_MIN;
			else if (errno != ENOENT && errno != ENOTDIR)
				return errno;
		}
		at += length;
		if (*at == '\0')
			return found;
	}
}

static int run_child(void *argument)
{
	struct launch *launch = argument;
	const struct exec_request *request = launch->request;
	sigset_t none;

	setsid();
	for (int fd = 0; fd < 3; fd++)
		if (dup2(launch->fds[fd], fd) < 0) {
			launch->error = errno;
			launch->what = "descriptors";
			_exit(127);
		}
	if ((request->flags & EXEC_TTY) != 0)
		ioctl(0, TIOCSCTTY, 0);
	if (launch->die_with_parent)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (launch->machine != NULL && !become_program(launch->machine, launch->in_group)) {
		launch->error = errno;
		launch->what = "user";
		_exit(127);
	}
	if (request->cwd[0] != '\0' && chdir(request->cwd) != 0) {
		launch->error = errno;
		launch->what = "workdir";
		_exit(127);
	}
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	launch->error = exec_by_name(request->argv, request->envp);
	launch->what = "command";
	/* ENOENT of a file that is there: what is missing is its interpreter. */
	if ((launch->error & INT_MIN) != 0 ||
	    (launch->error == ENOENT && strchr(request->argv[0], '/') != NULL &&
	     faccessat(AT_FDCWD, request->argv[0], F_OK, 0) == 0)) {
		launch->error = ENOENT;
		launch->what = "interpreter";
	}
	_exit(127);
}

/*
 * A child that is born in its control group: going there afterwards costs a machine without hardware virtualisation
 * several milliseconds. There is no function of the C library for this; the child goes on where vfork's would.
 */
static __attribute__((noinline)) pid_t clone_into(int group, struct launch *launch)
{
	struct clone_args args = {
		.flags = CLONE_VM | CLONE_VFORK | CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t)group};
	long result = -ENOSYS;

#if defined(__x86_64__)
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(SYS_clone3), "D"(&args), "S"(sizeof args)
			 : "rcx", "r11", "memory");
#elif defined(__aarch64__)
	register long number __asm__("x8") = SYS_clone3;
	register void *first __asm__("x0") = &args;
	register unsigned long second __asm__("x1") = sizeof args;

	__asm__ volatile("svc #0" : "+r"(first) : "r"(number), "r"(second) : "memory");
	result = (long)first;
#endif
	if (result == 0)
		run_child(launch);
	return result < 0 ? -1 : (pid_t)result;
}

static pid_t clone_machine_program(struct launch *launch)
{
	if (launch->machine == NULL || launch->machine->group_fd < 0)
		return -1;
	launch->in_group = true;
	/* The group is root's; the child becomes the user before it becomes the program. */
	act_as_root(launch->machine);
	pid_t pid = clone_into(launch->machine->group_fd, launch);
	act_as_user(launch->machine);
	launch->in_group = false;
	return pid;
}

pid_t spawn(struct launch *launch)
{
	launch->error = 0;
	launch->what = "process";
	pid_t pid = clone_machine_program(launch);
	/* An old kernel; or the group is full, and whoever asks from outside is let in all the same. */
	if (pid < 0)
		pid = clone(run_child, child_stack + sizeof child_stack, CLONE_VM | CLONE_VFORK | SIGCHLD, launch);
	if (pid < 0) {
		launch->error = errno;
		return -1;
	}
	if (launch->error != 0) {
		while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
			;
		return -1;
	}
	return pid;
}
