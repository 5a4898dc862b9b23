package blk

import (
	"bytes"
	"fmt"

	disks "github.com/govmm/govmm/image"
)

// converted says how to make a raw image of a format, with the path and the path of the
// result. Others than these are named -f by qemu-img convert.
var converted = map[string]string{
	"qcow2": "govmm image import %s %s",
	"gzip":  "govmm image import %s %s",
	"xz":    "govmm image import %s %s",
	"zstd":  "govmm image import %s %s",
	"bzip2": "bzip2 -dc %s >%s",
	"vhd":   "qemu-img convert -f vpc -O raw %s %s",
}

// refuseFormat examines the first and the last bytes of an image. A guest would
// not find its data in a file of another format, and a write would destroy it.
func refuseFormat(path string, head, tail []byte) error {
	format := disks.Sniff(head, tail)
	if format == "" {
		return nil
	}
	how := converted[format]
	if how == "" {
		how = "qemu-img convert -f " + format + " -O raw %s %s"
	}
	or := "use format=raw if it is raw"
	if format == "qcow2" {
		or = "format=qcow2,ephemeral reads it where it is, and what the guest writes is gone at its end; format=raw if it is raw"
	}
	return fmt.Errorf("%w: its format is %s; convert it: %s (or %s)", ErrNotRaw, format, fmt.Sprintf(how, quote(path), quote(path+".raw")), or)
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
