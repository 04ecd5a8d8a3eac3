/* One binary, several roles: which one is the first argument. */
#include "agent.h"
#include "init.h"
#include "nursery.h"
#include "settle.h"
#include "ticks.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EXIT_SETUP = 125, EXIT_USAGE = 64, FIRST_FREE_FD = 3 };

/*
 * A channel that came as standard input, as gVisor's does (of a restored guest's descriptors it connects only the
 * standard ones anew): move it above them and let them lead nowhere.
 */
static bool move_from_stdin(int *channel_fd)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	int moved = fcntl(STDIN_FILENO, F_DUPFD, FIRST_FREE_FD);

	for (int fd = 0; null >= 0 && moved >= 0 && fd < FIRST_FREE_FD; fd++)
		if (dup2(null, fd) != fd)
			moved = -1;
	*channel_fd = moved;
	return null >= 0 && moved >= 0;
}

/* The value of `--name=N` in `argument`, through *out. False when it is another option or no number. */
static bool number_option(const char *argument, const char *name, int *out)
{
	size_t length = strlen(name);
	char *end;

	if (strncmp(argument, name, length) != 0 || argument[length] != '=' || argument[length + 1] == '\0')
		return false;
	errno = 0;
	long value = strtol(argument + length + 1, &end, 10);
	if (errno != 0 || *end != '\0' || value < 0 || value > INT_MAX)
		return false;
	*out = (int)value;
	return true;
}

static int run_agent(int argc, char **argv)
{
	struct agent_config config = {.channel_fd = -1, .listen_fd = -1, .runner_fd = -1, .group_fd = -1,
				      .own_pid_namespace = true};
	int runner_pid = 0;

	for (int i = 2; i < argc; i++) {
		if (strcmp(argv[i], "--shared-pids") == 0)
			config.own_pid_namespace = false;
		else if (!number_option(argv[i], "--channel", &config.channel_fd) &&
			 !number_option(argv[i], "--listen", &config.listen_fd) &&
			 !number_option(argv[i], "--runner", &config.runner_fd) &&
			 !number_option(argv[i], "--runner-pid", &runner_pid)) {
			fprintf(stderr, "tartarus-guest: unknown option %s\n", argv[i]);
			return EXIT_USAGE;
		}
	}
	/* Whoever connects later finds what an earlier one left, as in a machine that was saved. */
	config.machine = config.listen_fd >= FIRST_FREE_FD;
	if (!config.machine && (config.channel_fd == 1 || config.channel_fd == 2 || config.channel_fd < 0)) {
		fprintf(stderr, "tartarus-guest: --channel=FD is missing, or is 1 or 2\n");
		return EXIT_USAGE;
	}
	if (config.channel_fd == STDIN_FILENO && !move_from_stdin(&config.channel_fd))
		return EXIT_SETUP;
	config.runner_pid = runner_pid;
	return agent_main(&config);
}

/* As gVisor's host has it done in a restored guest, by a process with the privileges that this takes. */
static int run_name(const char *name, int count, char **forgotten)
{
	if (sethostname(name, strlen(name)) != 0) {
		perror("tartarus-guest: sethostname");
		return EXIT_FAILURE;
	}
	if (count > 0 && !settle_forget(count, forgotten)) {
		perror("tartarus-guest: an address of before");
		return EXIT_FAILURE;
	}
	return EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
	/* The kernel starts it from the initramfs, with what it didn't know on its command line as arguments. */
	if (getpid() == 1 && strcmp(argv[0], "/init") == 0)
		return init_main();
	if (argc >= 2 && strcmp(argv[1], "agent") == 0)
		return run_agent(argc, argv);
	if (argc >= 2 && strcmp(argv[1], "nursery") == 0)
		return nursery_main(argc, argv);
	if (argc == 2 && strcmp(argv[1], "ticks") == 0)
		return ticks_main();
	if (argc >= 3 && strcmp(argv[1], "name") == 0)
		return run_name(argv[2], argc - 3, argv + 3);
	if (argc == 2 && strcmp(argv[1], "settle") == 0)
		return settle_wait() ? EXIT_SUCCESS : EXIT_FAILURE;
	fprintf(stderr, "usage: tartarus-guest agent --channel=FD|--listen=FD [--runner=FD --runner-pid=PID] [--shared-pids]\n"
			"       tartarus-guest nursery …\n"
			"       tartarus-guest ticks\n"
			"       tartarus-guest name HOSTNAME [ADDRESS OF BEFORE …]\n"
			"       tartarus-guest settle\n");
	return EXIT_USAGE;
}
