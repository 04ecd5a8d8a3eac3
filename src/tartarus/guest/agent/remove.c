/*
 * Removing files and trees. The tree may be changed by hostile code meanwhile, so every step is
 * taken relative to an open directory, never through a symbolic link, and the way back up is checked
 * against where we came from. At most two directories are open, however deep the tree.
 */
#include "files.h"

#include "paths.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { STEPS_PER_ROUND = 256, DEPTH_MAX = 1 << 16 };

struct identity {
	dev_t device;
	ino_t inode;
};

struct removal {
	struct stream stream;
	struct place place;
	DIR *dir;               /* where we are */
	struct identity *above; /* directories between the top and here, the top first */
	uint32_t depth, capacity;
};

static bool remember(struct removal *removal)
{
	struct stat info;

	if (removal->depth == removal->capacity) {
		uint32_t capacity = removal->capacity == 0 ? 16 : removal->capacity * 2;
		struct identity *above = realloc(removal->above, capacity * sizeof *above);

		if (above == NULL)
			return false;
		removal->above = above;
		removal->capacity = capacity;
	}
	if (fstat(dirfd(removal->dir), &info) != 0)
		return false;
	removal->above[removal->depth++] = (struct identity){info.st_dev, info.st_ino};
	return true;
}

/* Continue in the directory `fd`, which is taken over. 0 or -errno. */
static int enter(struct removal *removal, int fd)
{
	DIR *dir = fdopendir(fd);

	if (dir == NULL) {
		close(fd);
		return -ENOMEM;
	}
	if (removal->dir != NULL)
		closedir(removal->dir);
	removal->dir = dir;
	return 0;
}

static int descend(struct removal *removal, int dir, const char *name)
{
	int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

	if (fd < 0)
		return errno == ENOENT ? 0 : -errno;
	if (removal->dir != NULL && (removal->depth >= DEPTH_MAX || !remember(removal))) {
		close(fd);
		return -ENOMEM;
	}
	return enter(removal, fd);
}

static int ascend(struct removal *removal)
{
	struct stat info;
	struct identity expected = removal->above[--removal->depth];
	int fd = openat(dirfd(removal->dir), "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	if (fstat(fd, &info) != 0 || info.st_dev != expected.device || info.st_ino != expected.inode) {
		close(fd);
		return -EBUSY; /* it was moved away under our feet */
	}
	return enter(removal, fd);
}

/* Remove a file or an empty directory, or go down into one that is not empty. 0 or -errno. */
static int remove_entry(struct removal *removal, const char *name)
{
	int dir = dirfd(removal->dir);

	if (unlinkat(dir, name, 0) == 0 || errno == ENOENT)
		return 0;
	if (errno != EISDIR && errno != EPERM)
		return -errno;
	int error = errno;
	if (unlinkat(dir, name, AT_REMOVEDIR) == 0 || errno == ENOENT)
		return 0;
	if (errno == ENOTEMPTY || errno == EEXIST)
		return descend(removal, dir, name);
	return errno == ENOTDIR ? -error : -errno;
}

static void finish(struct session *session, struct removal *removal, int status, const char *what)
{
	if (status < 0)
		out_error(session, removal->stream.id, -status, what);
	else
		out_frame(session, F_RESULT, removal->stream.id, NULL, 0);
	stream_end(&removal->stream);
}

static bool remove_pump(struct session *session, struct stream *stream)
{
	struct removal *removal = CONTAINER_OF(stream, struct removal, stream);

	for (int step = 0; step < STEPS_PER_ROUND; step++) {
		struct dirent *entry = readdir(removal->dir);
		int status = 0;

		if (entry != NULL && strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
			status = remove_entry(removal, entry->d_name);
		else if (entry == NULL && removal->depth > 0)
			status = ascend(removal);
		else if (entry == NULL) {
			if (unlinkat(removal->place.dir, removal->place.name, AT_REMOVEDIR) == 0) {
				finish(session, removal, 0, "");
				return false;
			}
			if (errno != ENOTEMPTY)
				status = -errno;
			else
				rewinddir(removal->dir); /* something was put there meanwhile */
		}
		if (status != 0) {
			finish(session, removal, status, entry != NULL ? entry->d_name : "remove");
			return false;
		}
	}
	return true;
}

static void remove_destroy(struct session *session, struct stream *stream)
{
	struct removal *removal = CONTAINER_OF(stream, struct removal, stream);

	(void)session;
	if (removal->dir != NULL)
		closedir(removal->dir);
	free(removal->above);
	place_close(&removal->place);
}

static const struct stream_kind remove_kind = {.pump = remove_pump, .destroy = remove_destroy};

/* Remove what one call can remove. True when that was all; *status is then the outcome. */
static bool remove_at_once(const struct place *place, bool recursive, int *status)
{
	*status = 0;
	if (unlinkat(place->dir, place->name, 0) == 0)
		return true;
	*status = -errno;
	if (errno != EISDIR && errno != EPERM)
		return true;
	if (unlinkat(place->dir, place->name, AT_REMOVEDIR) == 0) {
		*status = 0;
		return true;
	}
	if (errno != ENOTDIR)
		*status = -errno;
	return !recursive || (errno != ENOTEMPTY && errno != EEXIST);
}

int serve_remove(struct session *session, uint32_t id, struct cursor *payload)
{
	char path[PATH_MAX];
	int status = get_path(payload, path);
	uint32_t recursive = get_u32(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	struct removal *removal = status != 0 ? NULL : calloc(1, sizeof *removal);
	if (removal == NULL) {
		out_error(session, id, status != 0 ? -status : ENOMEM, "remove");
		return 0;
	}
	stream_add(session, &removal->stream, &remove_kind, id);
	status = place_open(&removal->place, path, false);
	bool done = status != 0 || remove_at_once(&removal->place, recursive != 0, &status);
	if (!done) {
		status = descend(removal, removal->place.dir, removal->place.name);
		done = status != 0 || removal->dir == NULL;
	}
	if (done)
		finish(session, removal, status, "remove");
	return 0;
}
