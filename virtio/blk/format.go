package blk

import (
	"bytes"
	"fmt"
)

// probeBytes is how many bytes of each end of an image are examined.
const probeBytes = 512

// formats are formats of files that are often taken for raw images, with the bytes
// that mark them. Offsets are from the file's first byte, or from the first of its
// last 512 bytes.
var formats = []struct {
	name   string
	atEnd  bool
	offset int
	magic  string
	advice string // how to make a raw image, with the path and the path of the result
}{
	{"qcow2", false, 0, "QFI\xfb", "qemu-img convert -O raw %s %s"},
	{"qed", false, 0, "QED\x00", "qemu-img convert -f qed -O raw %s %s"},
	{"vmdk", false, 0, "KDMV", "qemu-img convert -f vmdk -O raw %s %s"},
	{"vmdk", false, 0, "COWD", "qemu-img convert -f vmdk -O raw %s %s"},
	{"vmdk", false, 0, "# Disk DescriptorFile", "qemu-img convert -f vmdk -O raw %s %s"},
	{"vdi", false, 0x40, "\x7f\x10\xda\xbe", "qemu-img convert -f vdi -O raw %s %s"},
	{"vhdx", false, 0, "vhdxfile", "qemu-img convert -f vhdx -O raw %s %s"},
	{"vhd", false, 0, "conectix", "qemu-img convert -f vpc -O raw %s %s"},
	{"vhd", true, 0, "conectix", "qemu-img convert -f vpc -O raw %s %s"},
	{"parallels", false, 0, "WithoutFreeSpace", "qemu-img convert -f parallels -O raw %s %s"},
	{"parallels", false, 0, "WithouFreSpacExt", "qemu-img convert -f parallels -O raw %s %s"},
	{"dmg", true, 0, "koly", "qemu-img convert -f dmg -O raw %s %s"},
	{"gzip", false, 0, "\x1f\x8b\x08", "gzip -dc %s >%s"},
	{"xz", false, 0, "\xfd7zXZ\x00", "xz -dc %s >%s"},
	{"zstd", false, 0, "\x28\xb5\x2f\xfd", "zstd -dc %s >%s"},
	{"bzip2", false, 0, "BZh", "bzip2 -dc %s >%s"},
}

// refuseFormat examines the first and the last bytes of an image. A guest would
// not find its data in a file of another format, and a write would destroy it.
func refuseFormat(path string, head, tail []byte) error {
	for _, f := range formats {
		b := head
		if f.atEnd {
			b = tail
		}
		if f.offset > len(b) || !bytes.HasPrefix(b[f.offset:], []byte(f.magic)) {
			continue
		}
		return fmt.Errorf("%w: its format is %s; convert it: %s (or use format=raw if it is raw)",
			ErrNotRaw, f.name, fmt.Sprintf(f.advice, quote(path), quote(path+".raw")))
	}
	return nil
}

// quote returns a path as one word for a shell.
func quote(path string) string {
	plain := true
	for _, b := range []byte(path) {
		plain = plain && (b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || bytes.IndexByte([]byte("/._-+:@%"), b) >= 0)
	}
	if plain {
		return path
	}
	return "'" + string(bytes.ReplaceAll([]byte(path), []byte("'"), []byte(`'\''`))) + "'"
}
