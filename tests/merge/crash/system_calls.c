/* Library for LD_PRELOAD: counts the system calls on files below one folder, and stops or fails one of them.

   cc -shared -fPIC -O2 -o system_calls.so system_calls.c -ldl

   begin(folder, which, at, action, error, log): from now on, number the calls of the kind `which` (CHANGES: calls that
   change files; READS: calls that open and read them) below `folder`, and do `action` instead of number `at` (from 1).
   Every counted call becomes a line of the file `log`: its name and its paths, separated by tabs.
   counted(): the number of calls so far. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CHANGES = 1, READS = 2 };
enum { NOTHING, KILL, TEAR, FAIL };

static char root[PATH_MAX];
static int which, action, error_number, log_fd = -1;
static long at, count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void begin(const char *folder, int kind, long number, int act, int error, const char *log) {
    snprintf(root, sizeof root, "%s", folder);
    which = kind, at = number, action = act, error_number = error, count = 0;
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

long counted(void) { return count; }

static void of_fd(int fd, char *text) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, text, PATH_MAX - 1);
    text[length < 0 ? 0 : length] = 0;
}

static void of_path(int folder, const char *path, char *text) {
    text[0] = 0;
    if (path == NULL) return;
    if (path[0] == '/') {
        snprintf(text, PATH_MAX, "%s", path);
        return;
    }
    char start[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (getcwd(start, sizeof start) == NULL) return;
    } else
        of_fd(folder, start);
    if (strlen(start) + strlen(path) + 2 < PATH_MAX) {
        strcpy(text, start);
        strcat(strcat(text, "/"), path);
    }
}

static int inside(const char *path) {
    size_t length = strlen(root);
    return length && strncmp(path, root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* Number one call. 0: do it; 1: do half of it and kill; -1: it failed, errno is set. */
static int meet(int kind, const char *name, const char *first, const char *second) {
    if (!which || kind != which || !(inside(first) || (second && inside(second)))) return 0;
    pthread_mutex_lock(&lock);
    long number = ++count;
    if (log_fd >= 0) {
        char line[3 * PATH_MAX];
        int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", name, first, second ? second : "");
        syscall(SYS_write, log_fd, line, length);
    }
    pthread_mutex_unlock(&lock);
    if (number != at || action == NOTHING) return 0;
    if (action == FAIL) {
        errno = error_number;
        return -1;
    }
    if (action == TEAR && strstr(name, "write")) return 1;
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static void end_torn(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define MEET_FD(kind, name, fd) \
    char path[PATH_MAX]; \
    of_fd(fd, path); \
    int met = meet(kind, name, path, NULL); \
    if (met < 0) return -1
#define MEET_PATH(kind, name, folder, given) \
    char path[PATH_MAX]; \
    of_path(folder, given, path); \
    if (meet(kind, name, path, NULL) < 0) return -1
#define MEET_PATHS(name, folder, given, other_folder, other_given) \
    char path[PATH_MAX], other[PATH_MAX]; \
    of_path(folder, given, path); \
    of_path(other_folder, other_given, other); \
    if (meet(CHANGES, name, path, other) < 0) return -1

#define OPEN_KIND(flags) (((flags) & (O_CREAT | O_TRUNC)) ? CHANGES : READS)

#define OPEN(symbol) \
    int symbol(const char *given, int flags, ...) { \
        REAL(int, #symbol, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        MEET_PATH(OPEN_KIND(flags), "open", AT_FDCWD, given); \
        return real(given, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(symbol) \
    int symbol(int folder, const char *given, int flags, ...) { \
        REAL(int, #symbol, int, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        MEET_PATH(OPEN_KIND(flags), "open", folder, given); \
        return real(folder, given, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (fd <= 2) return real(fd, data, size);
    MEET_FD(CHANGES, "write", fd);
    if (met) real(fd, data, size / 2), end_torn();
    return real(fd, data, size);
}

#define PWRITE(symbol) \
    ssize_t symbol(int fd, const void *data, size_t size, off_t offset) { \
        REAL(ssize_t, #symbol, int, const void *, size_t, off_t); \
        MEET_FD(CHANGES, "pwrite", fd); \
        if (met) real(fd, data, size / 8192 * 4096, offset), end_torn(); \
        return real(fd, data, size, offset); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define PWRITEV(symbol) \
    ssize_t symbol(int fd, const struct iovec *data, int number, off_t offset) { \
        REAL(ssize_t, #symbol, int, const struct iovec *, int, off_t); \
        MEET_FD(CHANGES, "pwritev", fd); \
        if (met) end_torn(); \
        return real(fd, data, number, offset); \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define PWRITEV2(symbol) \
    ssize_t symbol(int fd, const struct iovec *data, int number, off_t offset, int flags) { \
        REAL(ssize_t, #symbol, int, const struct iovec *, int, off_t, int); \
        MEET_FD(CHANGES, "pwritev", fd); \
        if (met) end_torn(); \
        return real(fd, data, number, offset, flags); \
    }
PWRITEV2(pwritev2)
PWRITEV2(pwritev64v2)

ssize_t writev(int fd, const struct iovec *data, int number) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (fd <= 2) return real(fd, data, number);
    MEET_FD(CHANGES, "writev", fd);
    if (met) end_torn();
    return real(fd, data, number);
}

ssize_t read(int fd, void *data, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    MEET_FD(READS, "read", fd);
    return real(fd, data, size);
}

#define PREADV(symbol) \
    ssize_t symbol(int fd, const struct iovec *data, int number, off_t offset) { \
        REAL(ssize_t, #symbol, int, const struct iovec *, int, off_t); \
        MEET_FD(READS, "preadv", fd); \
        return real(fd, data, number, offset); \
    }
PREADV(preadv)
PREADV(preadv64)

#define PREADV2(symbol) \
    ssize_t symbol(int fd, const struct iovec *data, int number, off_t offset, int flags) { \
        REAL(ssize_t, #symbol, int, const struct iovec *, int, off_t, int); \
        MEET_FD(READS, "preadv", fd); \
        return real(fd, data, number, offset, flags); \
    }
PREADV2(preadv2)
PREADV2(preadv64v2)

int fsync(int fd) {
    REAL(int, "fsync", int);
    MEET_FD(CHANGES, "fsync", fd);
    return real(fd);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    MEET_FD(CHANGES, "fsync", fd);
    return real(fd);
}

#define TRUNCATE(symbol) \
    int symbol(int fd, off_t size) { \
        REAL(int, #symbol, int, off_t); \
        MEET_FD(CHANGES, "ftruncate", fd); \
        return real(fd, size); \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define ALLOCATE(symbol) \
    int symbol(int fd, off_t offset, off_t size) { /* returns its error, and leaves errno alone */ \
        REAL(int, #symbol, int, off_t, off_t); \
        char path[PATH_MAX]; \
        of_fd(fd, path); \
        if (meet(CHANGES, "fallocate", path, NULL) < 0) return errno; \
        return real(fd, offset, size); \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

int fchmod(int fd, mode_t mode) {
    REAL(int, "fchmod", int, mode_t);
    MEET_FD(CHANGES, "fchmod", fd);
    return real(fd, mode);
}

int chmod(const char *given, mode_t mode) {
    REAL(int, "chmod", const char *, mode_t);
    MEET_PATH(CHANGES, "chmod", AT_FDCWD, given);
    return real(given, mode);
}

int mkdir(const char *given, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    MEET_PATH(CHANGES, "mkdir", AT_FDCWD, given);
    return real(given, mode);
}

int unlink(const char *given) {
    REAL(int, "unlink", const char *);
    MEET_PATH(CHANGES, "unlink", AT_FDCWD, given);
    return real(given);
}

int unlinkat(int folder, const char *given, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    MEET_PATH(CHANGES, "unlink", folder, given);
    return real(folder, given, flags);
}

int rmdir(const char *given) {
    REAL(int, "rmdir", const char *);
    MEET_PATH(CHANGES, "rmdir", AT_FDCWD, given);
    return real(given);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    MEET_PATHS("rename", AT_FDCWD, from, AT_FDCWD, to);
    return real(from, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    MEET_PATHS(flags & 2 ? "exchange" : "rename", from_folder, from, to_folder, to);
    return real(from_folder, from, to_folder, to, flags);
}

int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    MEET_PATHS("link", AT_FDCWD, from, AT_FDCWD, to);
    return real(from, to);
}

int symlink(const char *target, const char *given) {
    REAL(int, "symlink", const char *, const char *);
    MEET_PATH(CHANGES, "symlink", AT_FDCWD, given);
    return real(target, given);
}

int utimensat(int folder, const char *given, const struct timespec times[2], int flags) {
    REAL(int, "utimensat", int, const char *, const struct timespec *, int);
    MEET_PATH(CHANGES, "utimensat", folder, given);
    return real(folder, given, times, flags);
}
