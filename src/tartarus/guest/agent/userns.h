/* User namespaces for guests to enter: each with counters of the kernel's per-user quotas of its own. */
#ifndef TARTARUS_USERNS_H
#define TARTARUS_USERNS_H

#include <stdint.h>

/*
 * Make a user namespace below ours that maps ids 0 to span-1 to the same ids, and in which no user may have more
 * inotify instances and watches than these, nor make user namespaces. Needs CAP_SETUID, CAP_SETGID and CAP_SETFCAP.
 * Returns a descriptor that is all that holds it, or -errno.
 */
int userns_make(uint32_t span, uint32_t inotify_instances, uint32_t inotify_watches);

#endif
