/* A channel that is accepted from a listening socket, and accepted anew when it was lost. */
#ifndef TARTARUS_LISTEN_H
#define TARTARUS_LISTEN_H

#include "session.h"

/* A vsock socket that only the host can reach, or -1 with errno. */
int listen_vsock(unsigned port);

/* Serve whoever connects to config.listen_fd next. */
bool listen_attach(struct session *session);

/* The channel broke. True: another is waited for, as a machine that was restored does. False: there is none to come. */
bool listen_lost(struct session *session);

#endif
