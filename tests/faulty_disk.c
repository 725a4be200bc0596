/* Preloaded into a process: counts what it does to files below a folder, and at the nth of these operations the process
 * is gone (as with kill -9), or the disk is full from there on. A write is cut in the middle. Blocks of data, which
 * TileDB commits as a whole, count as one operation each. Built by the test that uses it; nothing happens before
 * arm(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[4096];
static int armed, at, full, count;
static char below[4096]; /* descriptors of files below the folder */

void arm(const char *folder, int nth, int disk_is_full) {
    strncpy(root, folder, sizeof root - 1);
    at = nth, full = disk_is_full, count = 0, armed = 1;
}

int operations(void) { return count; }

/* Of a block's files only the folder that holds them counts. */
static int inside(const char *path) {
    if (!armed || !path || strncmp(path, root, strlen(root))) return 0;
    const char *block = strstr(path, "/__fragments/");
    return !block || !strchr(block + strlen("/__fragments/"), '/');
}

/* 1: go on; 0: the operation fails, the disk is full. */
static int step(int needs_room) {
    int now = __sync_add_and_fetch(&count, 1);
    if (!at || now < at) return 1;
    if (!full) _exit(137);
    if (!needs_room) return 1;
    errno = ENOSPC;
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int opened(int descriptor, const char *path) {
    if (descriptor >= 0 && descriptor < (int)sizeof below) below[descriptor] = inside(path) != 0;
    return descriptor;
}

#define OPEN(name, before, given)                                                             \
    int name before {                                                                         \
        va_list rest;                                                                         \
        va_start(rest, flags);                                                                \
        int mode = va_arg(rest, int);                                                         \
        va_end(rest);                                                                         \
        if ((flags & O_CREAT) && inside(path) && access(path, F_OK) && !step(1)) return -1;   \
        return opened(REAL(name) given, path);                                                \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

#define IS_BELOW(descriptor) (armed && descriptor >= 0 && descriptor < (int)sizeof below && below[descriptor])

/* The first half of the bytes is written before the process is gone. */
#define WRITE(name, before, given, half)                          \
    ssize_t name before {                                         \
        if (IS_BELOW(descriptor)) {                               \
            if (at && !full && count + 1 == at) REAL(name) half;  \
            if (!step(1)) return -1;                              \
        }                                                         \
        return REAL(name) given;                                  \
    }
WRITE(write, (int descriptor, const void *bytes, size_t n), (descriptor, bytes, n), (descriptor, bytes, n / 2))
WRITE(pwrite, (int descriptor, const void *bytes, size_t n, off_t place), (descriptor, bytes, n, place),
      (descriptor, bytes, n / 2, place))
WRITE(pwrite64, (int descriptor, const void *bytes, size_t n, off64_t place), (descriptor, bytes, n, place),
      (descriptor, bytes, n / 2, place))

int mkdir(const char *path, mode_t mode) {
    if (inside(path) && !step(1)) return -1;
    return REAL(mkdir)(path, mode);
}

int rename(const char *from, const char *to) {
    if ((inside(from) || inside(to)) && !step(0)) return -1;
    return REAL(rename)(from, to);
}

int unlink(const char *path) {
    if (inside(path) && !step(0)) return -1;
    return REAL(unlink)(path);
}

int rmdir(const char *path) {
    if (inside(path) && !step(0)) return -1;
    return REAL(rmdir)(path);
}

int fsync(int descriptor) {
    if (IS_BELOW(descriptor) && !step(0)) return -1;
    return REAL(fsync)(descriptor);
}
