/* A session that stands still, so that the guest can be saved and go on with another host end. */
#ifndef TARTARUS_QUIET_H
#define TARTARUS_QUIET_H

#include "session.h"

/* QUIESCE: nothing is sent any more behind the answer. 0 or -EPROTO. */
int quiet_begin(struct session *session, struct cursor *payload);
/* A HELLO that resumes: `last_stream` must be the session's own. Says again which streams are open. 0 or -EPROTO. */
int quiet_resume(struct session *session, uint32_t last_stream);
/* GO_ON: with all streams, or with those that are named. 0 or -EPROTO. */
int quiet_end(struct session *session, struct cursor *payload);
/* Tell the host which streams are open, and what each may still send. */
void quiet_report(struct session *session, uint32_t serial);

#endif
