/* The files API: what the host does to files in the sandbox, with no more rights than the sandbox has. */
#ifndef TARTARUS_FILES_H
#define TARTARUS_FILES_H

#include "session.h"

/* Each serves one request, answering on stream `id`: 0, or -EPROTO for a malformed payload. */
int serve_stat(struct session *session, uint32_t id, struct cursor *payload);
int serve_mkdir(struct session *session, uint32_t id, struct cursor *payload);
int serve_move(struct session *session, uint32_t id, struct cursor *payload);
int serve_list(struct session *session, uint32_t id, struct cursor *payload);
int serve_read(struct session *session, uint32_t id, struct cursor *payload);
int serve_write(struct session *session, uint32_t id, struct cursor *payload);
int serve_remove(struct session *session, uint32_t id, struct cursor *payload);
int serve_watch(struct session *session, uint32_t id, struct cursor *payload);

/* Names of files that are being written; a watch does not mention them. */
#define TEMPORARY_PREFIX ".tartarus-"

#endif
