/*
 * In a virtual machine process 1 stays root, to set its clock and names and to switch it off; it acts as the
 * sandbox's user for all else. Programs become that user for good, in a control group that counts them: a root that
 * leaves the group gains nothing, for the machine's own memory is the wall that holds.
 */
#include "machine.h"

#include "program.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define USER_FILE "/sandbox/user"
#define ARGV_FILE "/sandbox/argv"
#define ENV_FILE "/sandbox/env"
#define PROGRAM_FILE "/sandbox/program"
#define GROUPS_AT "/sys/fs/cgroup"
#define GROUP GROUPS_AT "/sandbox"

enum { FILE_MAX = 1 << 20, WORDS_MAX = 4096, LINK_FD = 3, PARKED = 'P' };
enum { FREEZE_STEPS = 2000, FREEZE_STEP_NS = 100000 };
enum { FILES_SOFT = 1024, FILES_HARD = 65536 };

static const uid_t same = (uid_t)-1;
static bool frozen;
/* What each program does to itself in its user's place, where the host asks for more than a user. */
static unsigned char *confinement;
static size_t confinement_size;

char *read_all(const char *path, size_t *size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	char *bytes = fd < 0 ? NULL : malloc(FILE_MAX + 1);
	ssize_t n = 1;

	*size = 0;
	while (bytes != NULL && *size < FILE_MAX && (n = read(fd, bytes + *size, FILE_MAX - *size)) > 0)
		*size += (size_t)n;
	if (fd >= 0)
		close(fd);
	if (bytes != NULL)
		bytes[*size] = '\0';
	return bytes;
}

bool user_read(struct agent_config *config)
{
	size_t size;
	char *text = read_all(USER_FILE, &size), *at = text;
	size_t count = 0;

	if (text == NULL)
		return true;
	for (char *end; *at != '\0'; at = end) {
		unsigned long id = strtoul(at, &end, 10);

		if (end == at || id >= UINT32_MAX || count >= 2 + GROUPS_MAX_KEPT)
			break;
		if (count == 0)
			config->uid = (uid_t)id;
		else if (count == 1)
			config->gid = (gid_t)id;
		else
			config->groups[config->n_groups++] = (gid_t)id;
		count++;
	}
	bool whole = *at == '\0' && count >= 2;
	free(text);
	return whole;
}

static bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return done;
}

void group_make(struct agent_config *config)
{
	if (mount("cgroup2", GROUPS_AT, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0)
		return;
	(void)write_file(GROUPS_AT "/cgroup.subtree_control", "+pids");
	(void)write_file(GROUPS_AT "/cgroup.subtree_control", "+memory");
	(void)mkdir(GROUP, 0755);
	config->group_fd = open(GROUP, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

bool group_limit(uint32_t tasks, uint64_t memory)
{
	static uint32_t held_tasks;
	static uint64_t held_memory;
	char text[32];

	/* Most clones get the limits that the machine they are clones of was given before it was saved. */
	if (tasks == held_tasks && memory == held_memory)
		return true;
	snprintf(text, sizeof text, "%u", tasks);
	bool done = write_file(GROUP "/pids.max", text);
	snprintf(text, sizeof text, "%llu", (unsigned long long)memory);
	done = write_file(GROUP "/memory.max", text) && done;
	held_tasks = done ? tasks : 0;
	held_memory = memory;
	return done;
}

bool group_freeze(bool on)
{
	const struct timespec step = {0, FREEZE_STEP_NS};
	size_t size;

	/* Every clone is told to let its programs go on, and most were never stopped. */
	if (!on && !frozen)
		return true;
	if (!write_file(GROUP "/cgroup.freeze", on ? "1" : "0"))
		return false;
	frozen = on;
	for (int i = 0; i < FREEZE_STEPS; i++) {
		char *events = read_all(GROUP "/cgroup.events", &size);
		bool done = events != NULL && strstr(events, on ? "frozen 1" : "frozen 0") != NULL;

		free(events);
		if (done)
			return true;
		nanosleep(&step, NULL);
	}
	return false;
}

uint32_t memory_kills(void)
{
	static uint64_t told;
	size_t size;
	/* Of the group's limit and of the machine's own memory alike. */
	char *counters = read_all("/proc/vmstat", &size);
	char *line = counters == NULL ? NULL : strstr(counters, "\noom_kill ");
	uint64_t now = line == NULL ? told : strtoull(line + sizeof "\noom_kill", NULL, 10);
	uint64_t since = now > told ? now - told : 0;

	told = now;
	free(counters);
	return since < UINT32_MAX ? (uint32_t)since : UINT32_MAX;
}

/* By the kernel's own calls: the library's would speak to threads that there are none of, in memory that is lent. */
bool become_program(const struct agent_config *config, bool in_group)
{
	struct rlimit files = {FILES_SOFT, FILES_HARD};

	if (!in_group) {
		if (syscall(SYS_setresuid, same, 0, same) != 0)
			return false;
		(void)write_file(GROUP "/cgroup.procs", "0");
	}
	(void)syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, &files, NULL);
	if (confinement != NULL) {
		struct program_failure failure;

		/* It changes nothing of itself but addresses, which are always the same: our parent lends the memory. */
		if (program_run(confinement, confinement_size, NULL, 0, &failure) == 0)
			return true;
		errno = (int)failure.error;
		return false;
	}
	if (syscall(SYS_setgroups, config->n_groups, config->groups) != 0 ||
	    syscall(SYS_setresgid, config->gid, config->gid, config->gid) != 0 ||
	    syscall(SYS_setresuid, config->uid, config->uid, config->uid) != 0)
		return false;
	/* As at every level: a user who is not root does not become it. */
	return config->uid == 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
}

void act_as_user(const struct agent_config *config)
{
	static bool settled;

	if (!config->machine)
		return;
	if (settled) {
		if (config->uid != 0 && syscall(SYS_setresuid, same, config->uid, same) != 0)
			_exit(1);
		return;
	}
	settled = true;
	if (syscall(SYS_setgroups, config->n_groups, config->groups) != 0 ||
	    syscall(SYS_setresgid, same, config->gid, same) != 0 || syscall(SYS_setresuid, same, config->uid, same) != 0)
		_exit(1);
	prctl(PR_SET_DUMPABLE, 0);
}

void act_as_root(const struct agent_config *config)
{
	if (config->machine && config->uid != 0)
		(void)syscall(SYS_setresuid, same, 0, same);
}

/* NUL-separated words as execve(2) takes them; nothing when there is no such file. */
static char **read_words(const char *path)
{
	size_t size, count = 0;
	char *text = read_all(path, &size);
	char **words = text == NULL ? NULL : calloc(WORDS_MAX + 1, sizeof *words);

	for (size_t at = 0; words != NULL && at < size && count < WORDS_MAX; at += strlen(text + at) + 1)
		words[count++] = text + at;
	return words;
}

static char **companion_argv, **companion_env;

void companion_read(void)
{
	confinement = (unsigned char *)read_all(PROGRAM_FILE, &confinement_size);
	companion_argv = read_words(ARGV_FILE);
	companion_env = read_words(ENV_FILE);
}

static void become_companion(const struct agent_config *config, int link)
{
	char **argv = companion_argv;

	if (dup2(link, LINK_FD) == LINK_FD && chdir("/") == 0 && become_program(config, false))
		execve(argv[0], argv, companion_env);
	dprintf(2, "tartarus-guest init: %s: %s\n", argv[0], strerror(errno));
	_exit(127);
}

void companion_start(struct agent_config *config)
{
	int ends[2];
	char said = 0;

	if (companion_argv == NULL || companion_argv[0] == NULL || companion_env == NULL ||
	    socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
		return;
	pid_t pid = fork();
	if (pid == 0)
		become_companion(config, ends[1]);
	close(ends[1]);
	/* The host waits for the agent only so long, and reads what the interpreter printed when it is not parked. */
	while (pid > 0 && read(ends[0], &said, 1) < 0 && errno == EINTR)
		;
	if (said == PARKED) {
		config->runner_fd = ends[0];
		config->runner_pid = pid;
		return;
	}
	close(ends[0]);
	if (pid > 0)
		kill(pid, SIGKILL);
}
