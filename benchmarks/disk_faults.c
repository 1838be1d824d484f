/* Loaded before the C library (LD_PRELOAD): one call that changes the disk below a folder fails, or ends the process as a kill would.

   `fault_arm(folder, at, error, sticky)`: the call numbered `at` (from 1) fails with errno `error`, or ends the process where `error` is 0;
   with `sticky` all later calls that need room fail too, as on a full disk, where the first write that fails still writes a half. `fault_calls` counts, `fault_class` says which call it was. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MOST_CALLS = 1 << 20, KILLED = 9, SHORT = 2 };
enum { OPEN, WRITE, RENAME, LINK, FSYNC, UNLINK, MKDIR, ROOM };

static char below[PATH_MAX];
static size_t below_length;
static long fail_at;
static int fail_with, fail_on;
static atomic_long calls;
static unsigned char classes[MOST_CALLS];

void fault_arm(const char *folder, long at, int error, int sticky) {
  below_length = strlen(folder);
  memcpy(below, folder, below_length + 1);
  fail_at = at;
  fail_with = error;
  fail_on = sticky;
  atomic_store(&calls, 0);
}

long fault_calls(void) { return atomic_load(&calls); }
int fault_class(long number) { return classes[number - 1]; }

/* Whether this call is the one: then errno is set. SHORT is for a write of which a half is still written. */
static int fails(int class) {
  long number = atomic_fetch_add(&calls, 1) + 1;
  if (number <= MOST_CALLS) classes[number - 1] = class;
  int needs_room = class == OPEN || class == WRITE || class == MKDIR || class == ROOM;
  if (!fail_at || number < fail_at || (number > fail_at && !(fail_on && needs_room))) return 0;
  if (fail_with == 0) _exit(KILLED);
  errno = fail_with;
  return class == WRITE && number == fail_at && fail_with == ENOSPC ? SHORT : 1;
}

static int is_below(const char *path) { return below_length && strncmp(path, below, below_length) == 0; }

static int handle_below(int handle) {
  char link[64], path[PATH_MAX];
  if (!below_length || handle < 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return is_below(path);
}

static int path_below(int folder, const char *path) {
  char here[PATH_MAX];
  if (!below_length || path == NULL) return 0;
  if (path[0] == '/') return is_below(path);
  if (folder != AT_FDCWD) return handle_below(folder);
  return getcwd(here, sizeof here - 1) != NULL && is_below(strcat(here, "/"));
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list rest; \
    va_start(rest, flags); \
    mode = va_arg(rest, mode_t); \
    va_end(rest); \
  }

int open(const char *path, int flags, ...) {
  MODE(flags)
  return CHANGES(flags) && path_below(AT_FDCWD, path) && fails(OPEN) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE(flags)
  return CHANGES(flags) && path_below(AT_FDCWD, path) && fails(OPEN) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
  MODE(flags)
  return CHANGES(flags) && path_below(folder, path) && fails(OPEN) ? -1 : REAL(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
  MODE(flags)
  return CHANGES(flags) && path_below(folder, path) && fails(OPEN) ? -1 : REAL(openat64)(folder, path, flags, mode);
}

#define ON_HANDLE(class, type, failure, name, declared, passed) \
  type name declared { return handle_below(handle) && fails(class) ? failure : REAL(name) passed; }
#define ON_WRITE(name, declared, passed) \
  ssize_t name declared { \
    int failed = handle_below(handle) ? fails(WRITE) : 0; \
    if (failed == SHORT && size > 1) size /= 2; \
    else if (failed) return -1; \
    return REAL(name) passed; \
  }
ON_WRITE(write, (int handle, const void *data, size_t size), (handle, data, size))
ON_WRITE(pwrite, (int handle, const void *data, size_t size, off_t at), (handle, data, size, at))
ON_WRITE(pwrite64, (int handle, const void *data, size_t size, off64_t at), (handle, data, size, at))
ON_HANDLE(WRITE, ssize_t, -1, writev, (int handle, const struct iovec *parts, int number), (handle, parts, number))
ON_HANDLE(FSYNC, int, -1, fsync, (int handle), (handle))
ON_HANDLE(FSYNC, int, -1, fdatasync, (int handle), (handle))
ON_HANDLE(ROOM, int, -1, ftruncate, (int handle, off_t size), (handle, size))
ON_HANDLE(ROOM, int, -1, ftruncate64, (int handle, off64_t size), (handle, size))
ON_HANDLE(ROOM, int, -1, fallocate, (int handle, int mode, off_t at, off_t size), (handle, mode, at, size))
ON_HANDLE(ROOM, int, errno, posix_fallocate, (int handle, off_t at, off_t size), (handle, at, size))
ON_HANDLE(ROOM, int, errno, posix_fallocate64, (int handle, off64_t at, off64_t size), (handle, at, size))

#define ON_PATH(class, name, folder, path, declared, passed) \
  int name declared { return path_below(folder, path) && fails(class) ? -1 : REAL(name) passed; }
ON_PATH(RENAME, rename, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(RENAME, renameat, to_folder, to, (int folder, const char *from, int to_folder, const char *to), (folder, from, to_folder, to))
ON_PATH(RENAME, renameat2, to_folder, to, (int folder, const char *from, int to_folder, const char *to, unsigned flags),
        (folder, from, to_folder, to, flags))
ON_PATH(LINK, link, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(LINK, linkat, to_folder, to, (int folder, const char *from, int to_folder, const char *to, int flags),
        (folder, from, to_folder, to, flags))
ON_PATH(LINK, symlink, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(UNLINK, unlink, AT_FDCWD, path, (const char *path), (path))
ON_PATH(UNLINK, unlinkat, folder, path, (int folder, const char *path, int flags), (folder, path, flags))
ON_PATH(UNLINK, rmdir, AT_FDCWD, path, (const char *path), (path))
ON_PATH(MKDIR, mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(MKDIR, mkdirat, folder, path, (int folder, const char *path, mode_t mode), (folder, path, mode))
