/* Executes a syscall program (see guest/program.py for the format). */
#ifndef TARTARUS_PROGRAM_H
#define TARTARUS_PROGRAM_H

#include <stddef.h>
#include <stdint.h>

struct program_failure {
	uint32_t step;
	uint32_t error; /* errno; EINVAL with step UINT32_MAX: the program itself is malformed */
};

/*
 * Run the program in `data` (modified in place). Passed descriptors are fds[0 .. n_fds-1].
 * Returns 0, or -1 with *failure filled. Stops at the first call that fails.
 */
int program_run(unsigned char *data, size_t size, const int *fds, size_t n_fds, struct program_failure *failure);

#endif
