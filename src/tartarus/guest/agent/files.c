/* Attributes, listings, and the requests that are done in one step. */
#include "files.h"

#include "paths.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	ENTRY_FIXED = 4 + 4 + 4 + 4 + 8 + 8 + 4,
	LIST_PAGE = 64 << 10,
	LIST_MAX = 100000, /* entries; a caller that needs more should not want them in one answer */
};

/* Append name, attributes and link target of `name` in `dir`. Returns the size, or 0 when it is not there. */
static uint32_t put_entry(uint8_t *out, int dir, const char *name, int flags, const char *shown)
{
	struct stat info;
	uint32_t length = (uint32_t)strlen(shown);
	ssize_t link_size = 0;

	if (fstatat(dir, name, &info, AT_SYMLINK_NOFOLLOW | flags) != 0)
		return 0;
	put_u32(out, length);
	memcpy(out + 4, shown, length);
	out += 4 + length;
	put_u32(out, info.st_mode);
	put_u32(out + 4, info.st_uid);
	put_u32(out + 8, info.st_gid);
	put_u64(out + 12, (uint64_t)info.st_size);
	put_u64(out + 20, (uint64_t)((int64_t)info.st_mtim.tv_sec * 1000000000 + info.st_mtim.tv_nsec));
	if (S_ISLNK(info.st_mode)) {
		link_size = readlinkat(dir, name, (char *)out + 32, PATH_MAX);
		link_size = link_size < 0 ? 0 : link_size;
	}
	put_u32(out + 28, (uint32_t)link_size);
	return ENTRY_FIXED + length + (uint32_t)link_size;
}

static int answer(struct session *session, uint32_t id, int status, const char *what)
{
	if (status < 0)
		out_error(session, id, -status, what);
	else
		out_frame(session, F_RESULT, id, NULL, 0);
	return 0;
}

int serve_stat(struct session *session, uint32_t id, struct cursor *payload)
{
	char path[PATH_MAX];
	int status = get_path(payload, path);

	if (!cursor_done(payload))
		return -EPROTO;
	int fd = status != 0 ? status : open_path(path, O_PATH | O_NOFOLLOW, 0);
	if (fd < 0)
		return answer(session, id, fd, "stat");
	uint8_t *room = out_reserve(session, ENTRY_FIXED + 2 * PATH_MAX);
	uint32_t size = room == NULL ? 0 : put_entry(room, fd, "", AT_EMPTY_PATH, path);
	if (size == 0)
		answer(session, id, -errno, "stat");
	else
		out_commit(session, F_RESULT, 0, id, size);
	close(fd);
	return 0;
}

int serve_mkdir(struct session *session, uint32_t id, struct cursor *payload)
{
	char path[PATH_MAX];
	int status = get_path(payload, path);
	uint32_t mode = get_u32(payload);
	uint32_t parents = get_u32(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	return answer(session, id, status != 0 ? status : make_directory(path, mode, parents != 0), "mkdir");
}

static int move(const char *source, const char *target)
{
	struct place from, to;
	int status = place_open(&from, source, false);

	if (status != 0)
		return status;
	status = place_open(&to, target, false);
	if (status == 0 && renameat(from.dir, from.name, to.dir, to.name) != 0)
		status = -errno;
	place_close(&from);
	place_close(&to);
	return status;
}

int serve_move(struct session *session, uint32_t id, struct cursor *payload)
{
	char source[PATH_MAX], target[PATH_MAX];
	int status = get_path(payload, source);
	int target_status = get_path(payload, target);

	if (!cursor_done(payload))
		return -EPROTO;
	status = status != 0 ? status : target_status;
	return answer(session, id, status != 0 ? status : move(source, target), "move");
}

struct listing {
	struct stream stream;
	DIR *dir;
	uint32_t count;
};

static bool list_pump(struct session *session, struct stream *stream)
{
	struct listing *listing = CONTAINER_OF(stream, struct listing, stream);
	uint32_t size = 0;
	struct dirent *entry = NULL;

	if (out_busy(session))
		return false;
	uint8_t *room = out_reserve(session, LIST_PAGE);
	if (room == NULL)
		return false;
	while (LIST_PAGE - size >= ENTRY_FIXED + NAME_MAX + PATH_MAX && (entry = readdir(listing->dir)) != NULL) {
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		uint32_t added = put_entry(room + size, dirfd(listing->dir), entry->d_name, 0, entry->d_name);
		size += added;
		listing->count += added > 0;
	}
	if (listing->count > LIST_MAX) {
		out_error(session, stream->id, EOVERFLOW, "list");
		stream_end(stream);
		return false;
	}
	out_commit(session, F_RESULT, entry != NULL ? FRAME_MORE : 0, stream->id, size);
	if (entry == NULL)
		stream_end(stream);
	return entry != NULL;
}

static void list_destroy(struct session *session, struct stream *stream)
{
	(void)session;
	closedir(CONTAINER_OF(stream, struct listing, stream)->dir);
}

static const struct stream_kind list_kind = {.pump = list_pump, .destroy = list_destroy};

int serve_list(struct session *session, uint32_t id, struct cursor *payload)
{
	char path[PATH_MAX];
	int status = get_path(payload, path);

	if (!cursor_done(payload))
		return -EPROTO;
	int fd = status != 0 ? status : open_path(path, O_RDONLY | O_DIRECTORY | O_NONBLOCK, 0);
	if (fd < 0)
		return answer(session, id, fd, "list");
	struct listing *listing = calloc(1, sizeof *listing);
	DIR *dir = listing == NULL ? NULL : fdopendir(fd);
	if (dir == NULL) {
		close(fd);
		free(listing);
		return answer(session, id, -ENOMEM, "list");
	}
	listing->dir = dir;
	stream_add(session, &listing->stream, &list_kind, id);
	return 0;
}
