/* After a guest was restored from a snapshot: the time it missed, and randomness of its own. */
#ifndef TARTARUS_FIXUP_H
#define TARTARUS_FIXUP_H

#include "session.h"

int serve_freeze(struct session *session, struct cursor *payload);
int serve_fixup(struct session *session, uint32_t id, struct cursor *payload);

#endif
