/* Reaching every process of the sandbox, with a pid namespace of its own or without. */
#ifndef TARTARUS_KILL_H
#define TARTARUS_KILL_H

#include "session.h"

/* Is it a process of the sandbox, where there is no pid namespace to tell? */
bool is_descendant(pid_t pid);
/* Stop, then kill, all descendants of a process (not itself), however they fork meanwhile. Needs /proc. */
void kill_descendants(pid_t root);
void signal_everybody(struct session *session, int signo);
/* Returns when no descendant is left (or, as pid 1, at once: the kernel does it when we exit). */
void kill_everybody(struct session *session);

#endif
