/* Watches the calls by which a process changes files below one directory.
 *
 * Loaded by LD_PRELOAD. FAULT_ROOT is the directory. Before and after each call that changes it, the
 * directory (in the state that a kill would leave) is copied to FAULT_SNAPSHOTS, if that is set.
 * `fault_arm` makes chosen calls fail. Calls are numbered from 1 and logged in FAULT_LOG, one line
 * each: number, name, path, second path of a rename, result.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

enum kind { NONE = 0, ONCE = 1, LASTING = 2 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int inside;
static long number, chosen;
static int kind, error_number;
static int log_handle = -1;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const char *root(void) { return getenv("FAULT_ROOT"); }

static int below_root(const char *path) {
    const char *top = root();
    size_t length = top ? strlen(top) : 0;
    return length && !strncmp(path, top, length) && (path[length] == '/' || !path[length]);
}

/* Absolute path of a name relative to a directory, or of a file descriptor if name is NULL. */
static int absolute(int directory, const char *name, char *out) {
    char link[64], base[PATH_MAX];
    if (name && name[0] == '/') {
        snprintf(out, PATH_MAX, "%s", name);
        return 1;
    }
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size < 0) return 0;
        base[size] = 0;
    }
    if (name) snprintf(out, PATH_MAX, "%s/%s", base, name);
    else snprintf(out, PATH_MAX, "%s", base);
    return 1;
}

static void copy(const char *when) {
    const char *target = getenv("FAULT_SNAPSHOTS");
    if (!target) return;
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s/%05ld-%s", target, number, when);
    char *arguments[] = {"cp", "-a", (char *)root(), name, NULL};
    pid_t child;
    if (!posix_spawnp(&child, "cp", NULL, NULL, arguments, environ)) waitpid(child, NULL, 0);
}

static void note(const char *call, const char *path, const char *other, long result) {
    char line[2 * PATH_MAX];
    if (log_handle < 0 && getenv("FAULT_LOG"))
        log_handle = REAL(open)(getenv("FAULT_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log_handle < 0) return;
    int size = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\t%ld\n", number, call, path, other, result);
    if (REAL(write)(log_handle, line, size) != size) abort();
}

void fault_arm(int new_kind, int new_error, long at) {
    pthread_mutex_lock(&lock);
    kind = new_kind;
    error_number = new_error;
    number = 0;
    chosen = at;
    pthread_mutex_unlock(&lock);
}

/* Whether the current call must fail. */
static int fails(void) {
    return (kind == ONCE && number == chosen) || (kind == LASTING && number >= chosen);
}

/* The wrapped call: evaluates `what` under the lock, unless it must fail. */
#define GUARD(call, directory, name, other, what)                     \
    char path[PATH_MAX];                                              \
    if (inside || !root() || !absolute(directory, name, path) || !below_root(path)) return what; \
    inside = 1;                                                       \
    pthread_mutex_lock(&lock);                                        \
    number++;                                                         \
    copy("before");                                                   \
    __typeof__(what) result;                                          \
    int saved;                                                        \
    if (fails()) {                                                    \
        result = -1;                                                  \
        saved = error_number;                                         \
    } else {                                                          \
        result = what;                                                \
        saved = errno;                                                \
        copy("after");                                                \
    }                                                                 \
    note(call, path, other, (long)result);                            \
    pthread_mutex_unlock(&lock);                                      \
    inside = 0;                                                       \
    errno = saved;                                                    \
    return result

ssize_t write(int handle, const void *data, size_t size) {
    GUARD("write", handle, NULL, "", REAL(write)(handle, data, size));
}

ssize_t writev(int handle, const struct iovec *parts, int count) {
    GUARD("write", handle, NULL, "", REAL(writev)(handle, parts, count));
}

ssize_t pwrite(int handle, const void *data, size_t size, off_t offset) {
    GUARD("write", handle, NULL, "", REAL(pwrite)(handle, data, size, offset));
}

ssize_t pwrite64(int handle, const void *data, size_t size, off64_t offset) {
    GUARD("write", handle, NULL, "", REAL(pwrite64)(handle, data, size, offset));
}

int ftruncate(int handle, off_t size) {
    GUARD("truncate", handle, NULL, "", REAL(ftruncate)(handle, size));
}

int ftruncate64(int handle, off64_t size) {
    GUARD("truncate", handle, NULL, "", REAL(ftruncate64)(handle, size));
}

int truncate(const char *name, off_t size) {
    GUARD("truncate", AT_FDCWD, name, "", REAL(truncate)(name, size));
}

int truncate64(const char *name, off64_t size) {
    GUARD("truncate", AT_FDCWD, name, "", REAL(truncate64)(name, size));
}

int fsync(int handle) { GUARD("fsync", handle, NULL, "", REAL(fsync)(handle)); }

int fdatasync(int handle) { GUARD("fsync", handle, NULL, "", REAL(fdatasync)(handle)); }

int rename(const char *from, const char *to) {
    GUARD("rename", AT_FDCWD, from, to, REAL(rename)(from, to));
}

int renameat(int a, const char *from, int b, const char *to) {
    GUARD("rename", a, from, to, REAL(renameat)(a, from, b, to));
}

int mkdir(const char *name, mode_t mode) {
    GUARD("mkdir", AT_FDCWD, name, "", REAL(mkdir)(name, mode));
}

int mkdirat(int directory, const char *name, mode_t mode) {
    GUARD("mkdir", directory, name, "", REAL(mkdirat)(directory, name, mode));
}

int unlink(const char *name) { GUARD("unlink", AT_FDCWD, name, "", REAL(unlink)(name)); }

int unlinkat(int directory, const char *name, int flags) {
    GUARD("unlink", directory, name, "", REAL(unlinkat)(directory, name, flags));
}

int rmdir(const char *name) { GUARD("unlink", AT_FDCWD, name, "", REAL(rmdir)(name)); }

#define OPEN(function)                                                                    \
    int function(const char *name, int flags, ...) {                                      \
        va_list rest;                                                                     \
        va_start(rest, flags);                                                            \
        mode_t mode = va_arg(rest, mode_t);                                               \
        va_end(rest);                                                                     \
        if (!(flags & (O_CREAT | O_TRUNC))) return REAL(function)(name, flags, mode);     \
        GUARD("open", AT_FDCWD, name, "", REAL(function)(name, flags, mode));             \
    }

OPEN(open)
OPEN(open64)

#define OPENAT(function)                                                                  \
    int function(int directory, const char *name, int flags, ...) {                       \
        va_list rest;                                                                     \
        va_start(rest, flags);                                                            \
        mode_t mode = va_arg(rest, mode_t);                                               \
        va_end(rest);                                                                     \
        if (!(flags & (O_CREAT | O_TRUNC)))                                               \
            return REAL(function)(directory, name, flags, mode);                          \
        GUARD("open", directory, name, "", REAL(function)(directory, name, flags, mode)); \
    }

OPENAT(openat)
OPENAT(openat64)
