/* See descriptors.h. */
#include "descriptors.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif

enum { FDS_WITHOUT_CLOSE_RANGE = 4096 };

static void close_range_of(unsigned first, unsigned last)
{
	if (first > last || syscall(SYS_close_range, first, last, 0) == 0)
		return;
	for (unsigned fd = first; fd <= last && fd < FDS_WITHOUT_CLOSE_RANGE; fd++)
		close((int)fd);
}

void close_others(const struct agent_config *config)
{
	const int keep[] = {config->channel_fd, config->runner_fd, config->listen_fd, config->group_fd};
	unsigned first = 3;

	for (;;) {
		unsigned next = ~0U;

		for (size_t i = 0; i < sizeof keep / sizeof keep[0]; i++)
			if (keep[i] >= 0 && (unsigned)keep[i] >= first && (unsigned)keep[i] < next)
				next = (unsigned)keep[i];
		if (next == ~0U)
			break;
		close_range_of(first, next - 1);
		first = next + 1;
	}
	close_range_of(first, ~0U);
}

void fill_standard_fds(void)
{
	for (int fd = 0; fd < 3; fd++)
		if (fcntl(fd, F_GETFD) < 0 && errno == EBADF && open("/dev/null", O_RDWR) < 0)
			(void)!socket(AF_UNIX, SOCK_STREAM, 0);
}
