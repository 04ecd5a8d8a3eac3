/* The warm runner: a Python that has imported its libraries and becomes, or forks, the program. */
#ifndef TARTARUS_RUNNER_H
#define TARTARUS_RUNNER_H

#include "exec.h"

/* Take over the configured runner, if there is one. */
bool runner_attach(struct session *session);
bool runner_present(const struct session *session);
/* Ask the runner to run it. False when it can't be asked: start it cold. */
bool runner_offer(struct session *session, struct exec *exec);
/* The exec is going away. */
void runner_forget(struct session *session, struct exec *exec);
/* Send what waits, take in what the runner has said so far. */
void runner_pump(struct session *session);

#endif
