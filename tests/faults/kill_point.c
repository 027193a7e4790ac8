/* A library to preload: SIGKILLs its process at the k-th operation that changes what lies below a directory.

   KILL_BELOW  the directory, absolute; nothing is done without it
   KILL_AT     k, from 1; a write is done by half first, all else not at all
   KILL_LOG    a file that gets a line with the name of each operation

   Read at every operation, so that a parent can preload it and its forks choose. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int count;

static int is_below(int directory, const char *path) {
    const char *below = getenv("KILL_BELOW");
    char link[64], whole[PATH_MAX];
    if (!below) return 0;
    if (path && path[0] == '/') return !strncmp(path, below, strlen(below));
    if (directory == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, whole, sizeof whole - 1);
    if (length < 0) return 0;
    whole[length] = 0;
    return !strncmp(whole, below, strlen(below));
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Whether the process is to end at this operation. */
static int is_due(const char *name) {
    int now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    const char *log = getenv("KILL_LOG"), *at = getenv("KILL_AT");
    if (log) {
        char line[64];
        int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
        syscall(SYS_write, file, line, snprintf(line, sizeof line, "%s\n", name));
        syscall(SYS_close, file);
    }
    return at && now == atoi(at);
}

static void at(const char *name, int directory, const char *path) {
    if (is_below(directory, path) && is_due(name)) die();
}

ssize_t write(int fd, const void *bytes, size_t size) {
    if (is_below(fd, NULL) && is_due("write")) {
        NEXT(write)(fd, bytes, size / 2);
        die();
    }
    return NEXT(write)(fd, bytes, size);
}

ssize_t writev(int fd, const struct iovec *parts, int num_parts) {
    if (is_below(fd, NULL) && is_due("write")) {
        NEXT(write)(fd, parts[0].iov_base, parts[0].iov_len / 2);
        die();
    }
    return NEXT(writev)(fd, parts, num_parts);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    at("write", to, NULL);
    return NEXT(sendfile)(to, from, offset, size);
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
    at("write", to, NULL);
    return NEXT(sendfile64)(to, from, offset, size);
}

int fsync(int fd) {
    at("fsync", fd, NULL);
    return NEXT(fsync)(fd);
}

int rename(const char *from, const char *to) {
    at("rename", AT_FDCWD, to);
    return NEXT(rename)(from, to);
}

int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    at("rename", to_directory, to);
    return NEXT(renameat)(from_directory, from, to_directory, to);
}

int unlink(const char *path) {
    at("unlink", AT_FDCWD, path);
    return NEXT(unlink)(path);
}

int unlinkat(int directory, const char *path, int flags) {
    at("unlink", directory, path);
    return NEXT(unlinkat)(directory, path, flags);
}

int rmdir(const char *path) {
    at("rmdir", AT_FDCWD, path);
    return NEXT(rmdir)(path);
}

int mkdir(const char *path, mode_t mode) {
    at("mkdir", AT_FDCWD, path);
    return NEXT(mkdir)(path, mode);
}

int ftruncate64(int fd, off64_t size) {
    at("truncate", fd, NULL);
    return NEXT(ftruncate64)(fd, size);
}

#define OPENS(name)                                                              \
    int name(const char *path, int flags, ...) {                                 \
        va_list more;                                                            \
        va_start(more, flags);                                                   \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                \
        va_end(more);                                                            \
        if (flags & (O_CREAT | O_TRUNC)) at("create", AT_FDCWD, path);           \
        return NEXT(name)(path, flags, mode);                                    \
    }
OPENS(open)
OPENS(open64)

#define STREAMS(name)                                                            \
    FILE *name(const char *path, const char *mode) {                             \
        if (mode[0] != 'r') at("create", AT_FDCWD, path);                        \
        return NEXT(name)(path, mode);                                           \
    }
STREAMS(fopen)
STREAMS(fopen64)
