package kernel

import (
	"bytes"
	"fmt"
)

// File is a file of an initial RAM disk.
type File struct {
	Name string // "init", "dev/console"
	Mode uint32 // type and permissions as in stat(2); 0: a regular file, 0755
	Data []byte
	// Major and Minor are a device node's numbers.
	Major, Minor uint32
}

// File types of stat(2).
const (
	regular   = 0o100000
	directory = 0o040000
	character = 0o020000
)

// Initramfs returns an initial RAM disk with the files and /dev/console, as
// the kernel takes it: cpio, format "newc"
// (Documentation/driver-api/early-userspace/buffer-format.rst in Linux).
func Initramfs(files ...File) []byte {
	all := append([]File{
		{Name: "dev", Mode: directory | 0o755},
		{Name: "dev/console", Mode: character | 0o600, Major: 5, Minor: 1},
	}, files...)
	var b bytes.Buffer
	pad := func() { b.Write(make([]byte, -b.Len()&3)) }
	entry := func(ino int, f File) {
		if f.Mode == 0 {
			f.Mode = regular | 0o755
		}
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			ino, f.Mode, 0, 0, 1, 0, len(f.Data), 0, 0, f.Major, f.Minor, len(f.Name)+1, 0)
		b.WriteString(f.Name + "\x00")
		pad()
		b.Write(f.Data)
		pad()
	}
	for i, f := range all {
		entry(i+1, f)
	}
	entry(0, File{Name: "TRAILER!!!", Mode: regular})
	return b.Bytes()
}
