package virtio

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Absolute returns the path of a file of this host as every process knows it: a
// relative one behind the working directory. Nothing else is changed. A symbolic
// link stays, since it may be the name that several hosts have in common
// (/dev/disk/by-id), and so does "..", which means another file behind a link.
func Absolute(path string) (string, error) {
	if filepath.IsAbs(path) {
		return path, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return path, fmt.Errorf("find the working directory, which the path is relative to: %w", err)
	}
	for strings.HasPrefix(path, "./") {
		path = strings.TrimLeft(path[2:], "/")
	}
	return strings.TrimSuffix(dir, "/") + "/" + path, nil
}

// SplitOption splits the value of a device's option, such as path=a,,b,readonly,
// at single commas. Two commas stand for one that belongs to the item.
func SplitOption(s string) []string {
	var items []string
	var item strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] != ',':
			item.WriteByte(s[i])
		case i+1 < len(s) && s[i+1] == ',':
			item.WriteByte(',')
			i++
		default:
			items = append(items, item.String())
			item.Reset()
		}
	}
	return append(items, item.String())
}
