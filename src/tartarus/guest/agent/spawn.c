/*
 * Start a program: the child borrows this process's memory until execve (as posix_spawn does), so
 * a start costs no page table copy and its failure is known at once, without a pipe to carry it.
 */
#include "machine.h"
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
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
			execve(candidate, argv, envp);
			if (errno == EACCES)
				found = EACCES;
			else if (errno == ENOENT && faccessat(AT_FDCWD, candidate, F_OK, 0) == 0)
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
	if (launch->machine != NULL && !become_program(launch->machine)) {
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

pid_t spawn(struct launch *launch)
{
	launch->error = 0;
	launch->what = "process";
	pid_t pid = clone(run_child, child_stack + sizeof child_stack, CLONE_VM | CLONE_VFORK | SIGCHLD, launch);
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
