/* See quiet.h. */
#include "quiet.h"

#include "exec.h"

#include <errno.h>

enum { KEEP_ALL = 0, LET_GO = 1, KILL = 2, REPORT_HEAD = 8, REPORT_ENTRY = 16 };

static uint32_t at_most_u32(uint64_t value)
{
	return value < UINT32_MAX ? (uint32_t)value : UINT32_MAX;
}

void quiet_report(struct session *session, uint32_t serial)
{
	uint32_t count = 0;
	uint8_t *room = out_reserve(session, REPORT_HEAD + session->n_streams * REPORT_ENTRY);

	if (room == NULL)
		return;
	uint8_t *at = room + REPORT_HEAD;
	for (struct stream *stream = session->streams; stream != NULL; stream = stream->next) {
		struct allowances allowances = {0, 0};

		if (stream->ended || stream->let_go)
			continue;
		if (stream->kind->allowances != NULL)
			allowances = stream->kind->allowances(stream);
		put_u32(at, stream->id);
		put_u32(at + 4, stream->opened_by);
		put_u32(at + 8, at_most_u32(allowances.output));
		put_u32(at + 12, allowances.input);
		at += REPORT_ENTRY;
		count++;
	}
	put_u32(room, serial);
	put_u32(room + 4, count);
	out_commit(session, F_QUIESCED, 0, 0, (uint32_t)(at - room));
}

int quiet_begin(struct session *session, struct cursor *payload)
{
	uint32_t serial = get_u32(payload);

	if (!cursor_done(payload) || session->quiet)
		return -EPROTO;
	session->quiet = true;
	quiet_report(session, serial);
	return 0;
}

int quiet_resume(struct session *session, uint32_t last_stream)
{
	/* One that was not quiet had bytes under way, in one direction or the other, which are lost. */
	if (!session->quiet || last_stream != session->last_stream)
		return -EPROTO;
	/* What the old way to the host could take says nothing of the new one. */
	session->out.blocked = false;
	session->channel_readable = true;
	return 0;
}

static bool named(const uint8_t *ids, uint32_t count, uint32_t id)
{
	for (uint32_t i = 0; i < count; i++) {
		struct cursor cursor = cursor_over(ids + (size_t)4 * i, 4);

		if (get_u32(&cursor) == id)
			return true;
	}
	return false;
}

static bool all_open(const struct session *session, const uint8_t *ids, uint32_t count)
{
	uint32_t found = 0;

	for (const struct stream *stream = session->streams; stream != NULL; stream = stream->next)
		found += !stream->ended && !stream->let_go && named(ids, count, stream->id);
	return found == count;
}

int quiet_end(struct session *session, struct cursor *payload)
{
	uint32_t others = get_u32(payload);
	uint32_t count = get_u32(payload);
	const uint8_t *ids = payload->at;

	if (payload->bad || count > STREAMS_MAX || (size_t)(payload->end - ids) != (size_t)4 * count)
		return -EPROTO;
	if (!session->quiet || others > KILL || !all_open(session, ids, count))
		return -EPROTO;
	for (struct stream *stream = session->streams; others != KEEP_ALL && stream != NULL; stream = stream->next) {
		if (stream->ended || stream->let_go || named(ids, count, stream->id))
			continue;
		if (stream->opened_by == F_EXEC)
			exec_let_go(session, stream, others == KILL);
		else
			stream_end(stream);
	}
	session->quiet = false;
	return 0;
}
