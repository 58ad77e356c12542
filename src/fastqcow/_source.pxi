# Sources: where bytes come from, and what the core calls for those of file objects. A part of _reader.pyx, whose callbacks' rules hold here.

# What a thread is in: the calls of file objects, the innermost first. A signal handler, or a finalizer, that runs within one and reads the
# same file would wait for what its own thread is at work on.
cdef extern from *:
    """
    typedef struct file_call { void *lock; struct file_call *outer; } file_call;
    static _Thread_local file_call *file_calls;
    """
    ctypedef struct file_call:
        void *lock
        file_call *outer
    file_call *file_calls


cdef void begin_call(file_call *call, Source source) noexcept:
    global file_calls
    call.lock = <void *>source.lock
    call.outer = file_calls
    file_calls = call


cdef void end_call(file_call *call) noexcept:
    global file_calls
    file_calls = call.outer


cdef ptrdiff_t read_file(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off) noexcept nogil:
    return read_file_python(opaque, user, buf, nbytes, host_off) if Py_IsInitialized() else -1


cdef ptrdiff_t read_file_python(void *opaque, void *user, uint8_t *buf, size_t nbytes, uint64_t host_off) noexcept with gil:
    cdef ptrdiff_t got = -1
    cdef file_call call
    source = <Source>opaque
    begin_call(&call, source)
    try:
        got = source.read_file(buf, nbytes, host_off)
    except BaseException as e:
        if user != NULL:
            note(<Request>user, e)
    end_call(&call)
    return got


cdef int read_ranges(void *opaque, void *user, fq_range *ranges, size_t count) noexcept nogil:
    return read_ranges_python(opaque, user, ranges, count) if Py_IsInitialized() else -1


cdef int read_ranges_python(void *opaque, void *user, fq_range *ranges, size_t count) noexcept with gil:
    cdef int ret = -1
    cdef file_call call
    source = <Source>opaque
    begin_call(&call, source)
    try:
        ret = source.read_ranges(ranges, count, None if user == NULL else <Request>user)
    except BaseException as e:
        if user != NULL:
            note(<Request>user, e)
    end_call(&call)
    return ret


cdef bytes bytes_of(object data, size_t nbytes, str called):
    """What a method of a file object returned, if it is something that it may return."""
    if not isinstance(data, bytes):
        raise TypeError(f"{called}() returned {type(data).__name__}, not bytes")
    if <size_t>len(data) > nbytes:
        raise ValueError(f"{called}() returned {len(data)} bytes where {nbytes} were asked for")
    return data


@cython.no_gc_clear
cdef class Source:
    """A file that bytes come from: a descriptor that this object owns, or an open Python file.

    A file object is used under a lock, which all its sources share, one seek and one read at a time, and its position is left
    wherever that ends. But one that has a method `read_ranges` stands for a remote file: that is called by several threads at once,
    with a list of (host_off, nbytes) and a function that says whether the answer is still wanted, and returns a list of bytes, each
    short only at the end of the file.

    Attributes:
        path: what to call it in errors; a path if has_path.
        has_path: whether it lies in a directory, in which other files can lie beside it.
    """

    def __cinit__(self):
        self.fd = -1

    def __init__(self):
        raise TypeError("a Source is made by from_fd or from_file")

    def __dealloc__(self):
        _core.fq_source_free(self.c)
        if self.fd >= 0:
            close(self.fd)

    @staticmethod
    def from_fd(int fd, str path, bint has_path, bint seek_holes):
        """Takes the descriptor over, and closes it with the object. seek_holes: its position is nobody else's."""
        cdef Source self
        try:
            self = Source.__new__(Source)
        except MemoryError:
            close(fd)
            raise
        self.fd = fd
        self.path = path
        self.has_path = has_path
        self.c = _core.fq_source_fd(fd, seek_holes)
        if self.c == NULL:
            raise MemoryError
        return self

    @staticmethod
    def from_file(file, str path, bint has_path):
        cdef Source self = Source.__new__(Source)
        self.file = file
        self.path = path
        self.has_path = has_path
        self.lock = locks.for_file(file)
        self.enter()
        lock = self.lock.lock
        lock.acquire()
        try:
            size = file.seek(0, os.SEEK_END)
        finally:
            lock.release()
        if hasattr(file, "read_ranges"):
            self.c = _core.fq_source_remote(read_ranges, <void *>self, size)
        else:
            self.c = _core.fq_source_callback(read_file, <void *>self, size)
        if self.c == NULL:
            raise MemoryError
        return self

    cdef int enter(self) except -1:
        """Called before anything is read.

        Raises:
            RuntimeError: this thread is in the middle of a read of the same file object.
        """
        cdef file_call *call = file_calls
        while call != NULL:
            if call.lock == <void *>self.lock:
                raise RuntimeError(f"{self.path}: a reentrant read, from within a read of the same file object")
            call = call.outer
        return 0

    cdef ptrdiff_t read_file(self, uint8_t *buf, size_t nbytes, uint64_t host_off) except -1:
        # read() and a copy rather than readinto(): a file that kept the buffer it is given would keep memory of ours.
        lock = self.lock.lock
        lock.acquire()
        try:
            self.file.seek(host_off)
            data = self.file.read(nbytes)
        finally:
            lock.release()
        found = bytes_of(data, nbytes, f"{type(self.file).__name__}.read")
        memcpy(buf, PyBytes_AS_STRING(found), len(found))
        return len(found)

    cdef int read_ranges(self, fq_range *ranges, size_t count, Request request) except -1:
        wanted = [(ranges[i].host_off, ranges[i].nbytes) for i in range(count)]
        called = f"{type(self.file).__name__}.read_ranges"
        answers = self.file.read_ranges(wanted, request.stopped if request is not None else bool)
        if <size_t>len(answers) != count:
            raise ValueError(f"{called}() returned {len(answers)} answers where {count} were asked for")
        for i in range(count):
            data = bytes_of(answers[i], ranges[i].nbytes, called)
            memcpy(ranges[i].buf, PyBytes_AS_STRING(data), len(data))
            ranges[i].got = len(data)
        return 0

    @property
    def size(self):
        """Bytes of the file, as it is now."""
        return _core.fq_source_size(self.c)

    def identity(self):
        """What tells that two sources are the same file: device and inode, or a file object without a path itself."""
        if self.file is None:
            found = os.fstat(self.fd)
        elif self.has_path:
            found = os.stat(self.path)
        else:
            return getattr(self.file, "url", None) or id(self.file)
        return found.st_dev, found.st_ino

    def pread(self, size_t nbytes, uint64_t host_off):
        """Bytes of the file; short only at its end."""
        cdef size_t got
        cdef fq_error error
        cdef fq_status status
        cdef Request request = Request()
        data = PyBytes_FromStringAndSize(NULL, nbytes)
        cdef uint8_t *buf = <uint8_t *>PyBytes_AS_STRING(data)

        self.enter()
        with nogil:
            status = _core.fq_source_read(self.c, &request.c, buf, nbytes, host_off, &got, &error)
        check(status, &error, request, [(self.path, self.path)])
        return data if got == nbytes else data[:got]
