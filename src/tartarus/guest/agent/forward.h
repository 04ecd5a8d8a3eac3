/* Connections to ports inside the sandbox, carried to the host. */
#ifndef TARTARUS_FORWARD_H
#define TARTARUS_FORWARD_H

#include "session.h"

int serve_connect(struct session *session, uint32_t id, struct cursor *payload);

#endif
