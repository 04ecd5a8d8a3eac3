/* Paths inside the sandbox. They may change while we look, so each is resolved once and then held open. */
#ifndef TARTARUS_PATHS_H
#define TARTARUS_PATHS_H

#include "frame.h"

#include <limits.h>
#include <sys/types.h>

/* The next string of a payload as an absolute path. 0 or -errno. */
int get_path(struct cursor *payload, char path[PATH_MAX]);

/*
 * Open an absolute path. Each step is taken from an open directory, and symbolic links are followed by
 * their text: the magic ones of /proc, which lead into processes, and into this one, lead nowhere. With
 * O_NOFOLLOW in `flags` the last component is not followed. A descriptor, or -errno.
 */
int open_path(const char *path, int flags, mode_t mode);

/* A path as (open directory, last component). The component is a plain name: not "", "." or "..". */
struct place {
	int dir;
	char name[NAME_MAX + 1];
};

/* As open_path, for the last component of a place. */
int open_in(const struct place *place, int flags, mode_t mode);

/* 0 or -errno. With `make`, missing directories on the way are made. */
int place_open(struct place *place, const char *path, bool make);
void place_close(struct place *place);

/* Make one directory, or with `parents` those above it too, and then find no fault with one that is there. */
int make_directory(const char *path, mode_t mode, bool parents);

#endif
