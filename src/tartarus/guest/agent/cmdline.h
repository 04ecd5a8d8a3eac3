/* What the host says to a machine's init on the kernel's command line. */
#ifndef TARTARUS_CMDLINE_H
#define TARTARUS_CMDLINE_H

#include <stdbool.h>
#include <stddef.h>

/* The value of `name=value` in /proc/cmdline, into `out`. False, and an empty string, when it is not there or too long. */
bool cmdline_word(const char *name, char *out, size_t size);

/* The number N of `name=prefix:N`, or 0. */
unsigned cmdline_number(const char *name, const char *prefix);

#endif
