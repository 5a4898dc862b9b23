package find

import (
	"path"
	"slices"
	"strings"
)

// kernelNames are how a kernel's file begins, before its version.
var kernelNames = []string{"vmlinuz-", "vmlinux-", "linux-", "bzImage-", "kernel-"}

// initrdNames are what an initial RAM disk's file is called for a version.
var initrdNames = []string{"initrd.img-%", "initramfs-%.img", "initramfs-%", "initrd-%", "initrd-%.img", "initramfs-%-fallback.img", "initramfs.img-%"}

// plainSystem is the kernels that lie in a volume, the newest first, without a
// configuration.
func (s *search) plainSystem(v *volume) (entries []*Entry) {
	seen := make(map[string]bool)
	add := func(file, version string) {
		at, i, err := v.resolve(file)
		if err != nil || !i.mode.IsRegular() || i.size == 0 || seen[at] || len(entries) >= maxEntries {
			return
		}
		seen[at] = true
		e := &Entry{ID: path.Base(at), Title: "Linux " + version, Source: v.at(at), kernel: ref{v, at}}
		e.keys.version = strings.Replace(version, "-rc", "~rc", 1) // older than the release
		e.initrds = initrdOf(v, []string{path.Dir(at), path.Dir(file)}, version)
		entries = append(entries, e)
	}
	for _, dir := range []string{"/boot", "/"} {
		for _, name := range v.list(dir) {
			for _, prefix := range kernelNames {
				if version, ok := strings.CutPrefix(name, prefix); ok && version != "" && !strings.HasSuffix(version, ".old") &&
					!strings.Contains(version, "rescue") && !strings.HasSuffix(version, ".conf") && !strings.HasSuffix(version, ".hmac") {
					add(path.Join(dir, name), version)
				}
			}
		}
		for _, name := range []string{"vmlinuz", "bzImage", "vmlinux", "kernel"} {
			add(path.Join(dir, name), "")
		}
	}
	slices.SortStableFunc(entries, func(x, y *Entry) int {
		// One with a number is a version, others (linux, virt, lts) are names.
		a, b := x.keys.version, y.keys.version
		if c := sign(a == "" || !isDigit(a[0]), b == "" || !isDigit(b[0])); c != 0 {
			return c
		}
		return -compareVersions(a, b)
	})
	if len(entries) == 0 {
		return nil
	}
	root := s.rootOf()
	for _, e := range entries {
		e.Cmdline = root
		if e.Title == "Linux " {
			e.Title = "Linux"
		}
	}
	entries[0].Default = true
	return entries
}

// initrdOf finds the initial RAM disk of a version.
func initrdOf(v *volume, dirs []string, version string) []ref {
	for _, d := range dirs {
		if version == "" {
			for _, name := range []string{"initrd.img", "initramfs.img", "initrd", "initramfs"} {
				if _, ok := v.isFile(path.Join(d, name)); ok {
					return []ref{{v, path.Join(d, name)}}
				}
			}
		}
		for _, pattern := range initrdNames {
			name := path.Join(d, strings.ReplaceAll(pattern, "%", version))
			if _, ok := v.isFile(name); ok {
				return []ref{{v, name}}
			}
		}
	}
	return nil
}

// rootOf is the words of a command line that name the root: the first volume that has one.
func (s *search) rootOf() string {
	for _, v := range s.volumes {
		if !v.isFileOrLink("/sbin/init") && !v.isFileOrLink("/usr/lib/systemd/systemd") && !v.isFileOrLink("/bin/sh") && !v.isFileOrLink("/init") &&
			!(v.isDir("/etc") && v.isDir("/usr")) {
			continue
		}
		switch {
		case v.number == 0:
			return "root=/dev/vda ro"
		case v.partition.uuid != "":
			return "root=PARTUUID=" + v.partition.uuid + " ro"
		}
		return "root=/dev/vda" + itoa(v.number) + " ro"
	}
	return ""
}

// isFileOrLink says whether a file is there, perhaps as a link that leads nowhere in this
// volume.
func (v *volume) isFileOrLink(name string) bool {
	dir, i, err := v.resolve(path.Dir(name))
	if err != nil || !i.mode.IsDir() {
		return false
	}
	i, err = v.Lstat(path.Join(dir, path.Base(name)))
	return err == nil && !i.mode.IsDir()
}
