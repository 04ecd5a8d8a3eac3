/*
 * A user namespace comes to be with a process in it. That one sets what only who is inside may set, and is gone as
 * soon as the maps are written, which only who is outside may write.
 */
#include "userns.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Opened before any foreign code runs beside us: an interpreter of the template's may mount over the path. */
static int proc_fd = -1;

/* 0 or an errno. */
static int put(const char *path, const char *text)
{
	int fd = openat(proc_fd, path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return errno;
	ssize_t written = write(fd, text, strlen(text));
	int error = written < 0 ? errno : written != (ssize_t)strlen(text) ? EIO : 0;
	close(fd);
	return error;
}

static int put_number(const char *path, uint32_t value)
{
	char text[16];

	snprintf(text, sizeof text, "%u", value);
	return put(path, text);
}

/* In the new namespace, with all capabilities over it and none over anything else. */
static _Noreturn void inside(int report, uint32_t instances, uint32_t watches)
{
	int error = put_number("sys/user/max_inotify_instances", instances);

	if (error == 0)
		error = put_number("sys/user/max_inotify_watches", watches);
	if (error == 0)
		error = put_number("sys/user/max_user_namespaces", 0);
	/* Else the files that our parent writes the maps to would be the host's root's. */
	if (error == 0 && prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) != 0)
		error = errno;
	unsigned char byte = (unsigned char)error;
	if (write(report, &byte, 1) == 1)
		for (;;)
			pause();
	_exit(125);
}

static int map(pid_t pid, uint32_t span)
{
	static const char *const files[] = {"uid_map", "gid_map", "projid_map"};
	char path[48], line[48];
	int error = 0;

	snprintf(line, sizeof line, "0 0 %u", span);
	for (size_t i = 0; i < sizeof files / sizeof files[0] && error == 0; i++) {
		snprintf(path, sizeof path, "%d/%s", pid, files[i]);
		error = put(path, line);
	}
	return error;
}

int userns_make(uint32_t span, uint32_t inotify_instances, uint32_t inotify_watches)
{
	int report[2], fd = -1, error = 0;
	unsigned char byte = 0;
	char path[48];

	if (proc_fd < 0 && (proc_fd = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
		return -errno;
	if (pipe2(report, O_CLOEXEC) != 0)
		return -errno;
	pid_t pid = (pid_t)syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
	if (pid == 0)
		inside(report[1], inotify_instances, inotify_watches);
	error = pid < 0 ? errno : 0;
	close(report[1]);
	if (error == 0)
		error = read(report[0], &byte, 1) == 1 ? byte : EIO;
	close(report[0]);
	if (error == 0)
		error = map(pid, span);
	if (error == 0) {
		snprintf(path, sizeof path, "%d/ns/user", pid);
		fd = openat(proc_fd, path, O_RDONLY | O_CLOEXEC);
		error = fd < 0 ? errno : 0;
	}
	if (pid > 0) {
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
	}
	return error == 0 ? fd : -error;
}
