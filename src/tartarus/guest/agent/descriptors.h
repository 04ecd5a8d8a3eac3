/* Which descriptors the agent starts with: the standard ones, its own, and none that somebody forgot. */
#ifndef TARTARUS_DESCRIPTORS_H
#define TARTARUS_DESCRIPTORS_H

#include "agent.h"

/* Close all but the standard ones and those that are configured. */
void close_others(const struct agent_config *config);
/* Descriptors 0 to 2 must be taken, or a pipe could land there and be mistaken for a standard stream. */
void fill_standard_fds(void);

#endif
