/* Pseudo-terminals, without a path where the kernel can do without one. */
#include "exec.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif

static int open_peer(int master)
{
	int flags = O_RDWR | O_NOCTTY | O_CLOEXEC;
	int peer = ioctl(master, TIOCGPTPEER, flags);
	unsigned number;
	char path[32];

	if (peer >= 0 || ioctl(master, TIOCGPTN, &number) != 0)
		return peer;
	snprintf(path, sizeof path, "/dev/pts/%u", number);
	return open(path, flags);
}

int open_terminal(int fds[2], uint16_t rows, uint16_t cols)
{
	int unlock = 0;
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);

	if (master < 0)
		return -errno;
	int peer = ioctl(master, TIOCSPTLCK, &unlock) == 0 ? open_peer(master) : -1;
	if (peer < 0) {
		int error = errno;
		close(master);
		return -error;
	}
	resize_terminal(master, rows, cols);
	fds[0] = master;
	fds[1] = peer;
	return 0;
}

void resize_terminal(int fd, uint16_t rows, uint16_t cols)
{
	struct winsize size = {.ws_row = rows, .ws_col = cols};

	(void)ioctl(fd, TIOCSWINSZ, &size);
}
