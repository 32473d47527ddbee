/* Counts what a process does to files below a directory, and at the n-th of it kills the process or fills the disk.
 *
 * Loaded with LD_PRELOAD before Python starts, so that writes of every library are seen. Nothing is counted until
 * fault_arm() is called, which tests/faults/victims.py does after a fork. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, KILL = 1, HALF = 2, FULL = 3 };

static char below[4096];
static size_t length;
static volatile int action = -1;
static volatile long last, seen;

void fault_arm(const char *directory, int what, long n) {
    strncpy(below, directory, sizeof below - 1);
    length = strlen(below);
    last = n;
    seen = 0;
    action = what;
}

long fault_seen(void) { return seen; }

static int inside(const char *path) {
    char whole[8192];
    if (action < 0 || !path) return 0;
    if (path[0] != '/') {
        if (!getcwd(whole, 4096)) return 0;
        size_t end = strlen(whole);
        snprintf(whole + end, sizeof whole - end, "/%s", path);
        path = whole;
    }
    return !strncmp(path, below, length) && (path[length] == '/' || !path[length]);
}

static int inside_fd(int fd) {
    char link[64], path[4096];
    if (action < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0) return 0;
    path[size] = 0;
    return inside(path);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

enum { REMOVES = 0, WRITES = 1, NEEDS_SPACE = 2 };

/* 0: go on; 1: write the first half, then die; -1: the disk is full */
static int happens(int writes) {
    long number = __sync_add_and_fetch(&seen, 1);
    if (action == KILL && number == last) die();
    if (action == HALF && number == last) {
        if (writes != WRITES) die();
        return 1;
    }
    if (action == FULL && number >= last && writes) {
        errno = ENOSPC;
        return -1;
    }
    return 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (inside_fd(fd)) {
        int what = happens(WRITES);
        if (what < 0) return -1;
        if (what > 0) { real(fd, data, size / 2); die(); }
    }
    return real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (inside_fd(fd)) {
        int what = happens(WRITES);
        if (what < 0) return -1;
        if (what > 0) { real(fd, parts, 1); die(); }
    }
    return real(fd, parts, count);
}

#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t at) { \
        REAL(ssize_t, name, int, const void *, size_t, off_t); \
        if (inside_fd(fd)) { \
            int what = happens(WRITES); \
            if (what < 0) return -1; \
            if (what > 0) { real(fd, data, size / 2, at); die(); } \
        } \
        return real(fd, data, size, at); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define OF_FD(name, writes) \
    int name(int fd) { \
        REAL(int, name, int); \
        if (inside_fd(fd) && happens(writes) < 0) return -1; \
        return real(fd); \
    }
OF_FD(fsync, NEEDS_SPACE)
OF_FD(fdatasync, NEEDS_SPACE)

#define TRUNCATE(name) \
    int name(int fd, off_t size) { \
        REAL(int, name, int, off_t); \
        if (inside_fd(fd) && happens(NEEDS_SPACE) < 0) return -1; \
        return real(fd, size); \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    if ((inside(from) || inside(to)) && happens(REMOVES) < 0) return -1;
    return real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    if ((inside(from) || inside(to)) && happens(REMOVES) < 0) return -1;
    return real(a, from, b, to);
}

int unlink(const char *path) {
    REAL(int, unlink, const char *);
    if (inside(path) && happens(REMOVES) < 0) return -1;
    return real(path);
}

int unlinkat(int fd, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    if ((path[0] == '/' ? inside(path) : inside_fd(fd)) && happens(REMOVES) < 0) return -1;
    return real(fd, path, flags);
}

int rmdir(const char *path) {
    REAL(int, rmdir, const char *);
    if (inside(path) && happens(REMOVES) < 0) return -1;
    return real(path);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    if (inside(path) && happens(NEEDS_SPACE) < 0) return -1;
    return real(path, mode);
}
