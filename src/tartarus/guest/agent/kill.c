/*
 * Without a pid namespace the sandbox is "all our descendants": we are their subreaper, so whoever
 * loses its parent becomes our child. A process may fork while we look, so all are stopped first,
 * again and again until a look finds nobody new; what is stopped can't fork. Then all are killed.
 *
 * Where the confinement hides /proc, our children are found by asking wait(2) about pid after pid, from
 * our own to the newest. Grandchildren become children, and show, when their parents are gone. A fork
 * bomb may outrun that: then the nursery, which can see, ends the rest.
 */
#include "kill.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PID_MAX = 1 << 22, DEPTH_MAX = 256, STOP_ROUNDS = 64, KILL_ROUNDS = 5000, TABLE_MAX = 1 << 16 };

struct process {
	pid_t pid, parent;
	bool ours;
};

struct table {
	struct process *items;
	size_t count;
};

/* The parent of a process, from /proc/PID/stat; 0 when it is gone. */
static pid_t parent_of(pid_t pid)
{
	char path[64], text[512];
	int parent = 0;

	snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t n = read(fd, text, sizeof text - 1);
	close(fd);
	if (n <= 0)
		return 0;
	text[n] = '\0';
	/* The name, in parentheses, may hold anything, parentheses too. */
	const char *after_name = strrchr(text, ')');
	return after_name != NULL && sscanf(after_name + 1, " %*c %d", &parent) == 1 ? parent : 0;
}

bool is_descendant(pid_t pid)
{
	pid_t self = getpid();

	/* Confined without /proc there is no telling, and no reason to distrust. */
	if (parent_of(self) == 0)
		return true;
	for (int depth = 0; depth < DEPTH_MAX && pid > 1; depth++) {
		pid = parent_of(pid);
		if (pid == self)
			return true;
	}
	return false;
}

static bool add_process(struct table *table, const char *name)
{
	if (table->count % 256 == 0) {
		struct process *items = realloc(table->items, (table->count + 256) * sizeof *items);
		if (items == NULL)
			return false;
		table->items = items;
	}
	table->items[table->count++] = (struct process){atoi(name), parent_of(atoi(name)), false};
	return true;
}

static void read_table(struct table *table)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;

	table->count = 0;
	if (proc == NULL)
		return;
	while ((entry = readdir(proc)) != NULL && table->count < TABLE_MAX)
		if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9' && !add_process(table, entry->d_name))
			break;
	closedir(proc);
}

/* Mark all descendants of `root`: children of the marked, until a look finds no more. */
static void mark_descendants(struct table *table, pid_t root)
{
	bool found = true;

	while (found) {
		found = false;
		for (size_t i = 0; i < table->count; i++) {
			struct process *process = &table->items[i];

			for (size_t j = 0; j < table->count && !process->ours; j++)
				if (process->parent == root ||
				    (table->items[j].ours && table->items[j].pid == process->parent))
					found = process->ours = true;
		}
	}
}

/* The pid that was given out last, or -1. */
static pid_t newest_pid(void)
{
	pid_t pid = fork();

	if (pid == 0)
		_exit(0);
	if (pid > 0)
		waitpid(pid, NULL, 0);
	return pid;
}

/* Signal our children with pids from `first` to `last`, and their process groups. */
static void signal_range(pid_t first, pid_t last, int signo)
{
	siginfo_t info;

	for (pid_t pid = first; pid <= last; pid++)
		if (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0) {
			kill(-pid, signo);
			kill(pid, signo);
		}
}

static void signal_children(int signo)
{
	pid_t newest = newest_pid();
	pid_t self = getpid();

	if (newest > self) {
		signal_range(self + 1, newest, signo);
		return;
	}
	/* The numbers began anew, or there is no room for one more process. */
	signal_range(2, newest > 0 ? newest : self - 1, signo);
	signal_range(self + 1, PID_MAX, signo);
}

static bool proc_is_hidden(void)
{
	return parent_of(getpid()) == 0;
}

static size_t signal_descendants(pid_t root, int signo)
{
	struct table table = {NULL, 0};
	size_t count = 0;

	read_table(&table);
	mark_descendants(&table, root);
	for (size_t i = 0; i < table.count; i++)
		if (table.items[i].ours) {
			kill(table.items[i].pid, signo);
			count++;
		}
	free(table.items);
	return count;
}

void signal_everybody(struct session *session, int signo)
{
	if (session->config.own_pid_namespace)
		kill(-1, signo);
	else if (proc_is_hidden())
		signal_children(signo);
	else
		signal_descendants(getpid(), signo);
}

void kill_descendants(pid_t root)
{
	size_t before = 0;

	for (int round = 0; round < STOP_ROUNDS; round++) {
		size_t now = signal_descendants(root, SIGSTOP);
		if (now == before)
			break;
		before = now;
	}
	signal_descendants(root, SIGKILL);
}

void kill_everybody(struct session *session)
{
	struct timespec pause = {0, 200000};

	if (session->config.own_pid_namespace)
		return;
	bool hidden = proc_is_hidden();
	if (hidden)
		signal_children(SIGKILL);
	else
		kill_descendants(getpid());
	for (int round = 0; round < KILL_ROUNDS; round++) {
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD)
			return;
		nanosleep(&pause, NULL);
		if (hidden)
			signal_children(SIGKILL);
		else
			signal_descendants(getpid(), SIGKILL);
	}
}
