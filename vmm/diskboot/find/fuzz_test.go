package find

import (
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
)

// files is a file system in memory, without links.
type files map[string]string

func (f files) Lstat(name string) (info, error) {
	if text, ok := f[name]; ok {
		return info{size: int64(len(text))}, nil
	}
	if name == "/" {
		return info{mode: fs.ModeDir}, nil
	}
	for other := range f {
		if strings.HasPrefix(other, name+"/") {
			return info{mode: fs.ModeDir}, nil
		}
	}
	return info{}, fs.ErrNotExist
}

func (f files) Readlink(string) (string, error) { return "", fs.ErrInvalid }

func (f files) List(name string) (names []string, err error) {
	for other := range f {
		if path.Dir(other) == name {
			names = append(names, path.Base(other))
		}
	}
	return names, nil
}

func (f files) Open(name string) (io.Reader, error) { return strings.NewReader(f[name]), nil }

// within fails if f takes long, or leaves much behind.
func within(t *testing.T, f func()) {
	t.Helper()
	began := time.Now()
	f()
	if d := time.Since(began); d > 20*time.Second {
		t.Errorf("it took %v", d)
	}
}

// searchOf is a search of volumes with these files.
func searchOf(volumes ...files) *search {
	s := &search{}
	for i, f := range volumes {
		s.volumes = append(s.volumes, &volume{partition: partition{number: i + 1, scheme: "gpt", uuid: "u"}, fileSystem: f, kind: "ext4", uuid: "1234", label: "l"})
	}
	return s
}

// sane checks what every entry must be, and that what it boots can be told.
func sane(t *testing.T, s *search, entries []*Entry) {
	t.Helper()
	if len(entries) > 2*maxEntries {
		t.Errorf("%d entries", len(entries))
	}
	for _, e := range entries {
		if e.kernel.path == "" || e.kernel.path[0] != '/' || path.Clean(e.kernel.path) != e.kernel.path {
			t.Errorf("a kernel %q", e.kernel.path)
		}
		i, err := e.Image()
		if err != nil {
			continue
		}
		if i.Kernel.Size > MaxKernel || i.Initrd.Size > MaxInitrd || len(i.Cmdline) > MaxCmdline || strings.ContainsAny(i.Cmdline, "\n\x00") {
			t.Errorf("a kernel of %d bytes, an initrd of %d, a command line %q", i.Kernel.Size, i.Initrd.Size, i.Cmdline)
		}
	}
}

func FuzzGrub(f *testing.F) {
	for _, text := range []string{
		"set default=0\nmenuentry 'x' --id y {\n linux /k a=$b \"c d\"\n initrd /i /i\n}\n",
		"if [ -s $prefix/grubenv ]; then load_env; fi\nset default=\"${saved_entry}\"\nsubmenu a {\n menuentry b { search --fs-uuid --set=root 1234\n linux ($root)/k }\n}\n",
		"function f { f; f; }\nf\nmenuentry x { linux /k }", "blscfg", "configfile /boot/grub/grub.cfg", "x=y; menuentry \"$x\" {linux /k ${x}$x'z'\\ q}",
		"if true; then false; elif test a -lt 3 -a ! b = c; then\nfor x in a b; do echo; done\nwhile true; do true; done\nelse\nlinux /k\nfi\nmenuentry a {source /boot/grub/b\nlinux (hd0,1)/k}",
	} {
		f.Add(text, "# GRUB Environment Block\nsaved_entry=0\n", "title t\nlinux /k\noptions $o")
	}
	f.Fuzz(func(t *testing.T, config, env, bls string) {
		s := searchOf(files{"/k": "kernel", "/i": "initrd", "/boot/grub/grub.cfg": config, "/boot/grub/grubenv": env, "/boot/grub/b": config, "/loader/entries/a.conf": bls},
			files{"/k": "other", "/grub/grub.cfg": config})
		within(t, func() {
			s.loadSaved()
			entries, _ := s.grubSystem(s.volumes[0], "/boot/grub/grub.cfg")
			sane(t, s, entries)
			sane(t, s, s.blsSystem(s.volumes[0]))
		})
	})
}

func FuzzExtlinux(f *testing.F) {
	f.Add("default x\nlabel x\n kernel /k\n initrd /i,/i\n append a b\ninclude more\n", "label y\nmenu default\nlinux ../k\nappend -\ninclude extlinux.conf\nmenu include more")
	f.Fuzz(func(t *testing.T, config, more string) {
		s := searchOf(files{"/k": "kernel", "/i": "initrd", "/extlinux/extlinux.conf": config, "/extlinux/more": more})
		within(t, func() {
			entries, _ := s.extlinuxSystem(s.volumes[0], "/extlinux/extlinux.conf")
			sane(t, s, entries)
		})
	})
}

func FuzzBLS(f *testing.F) {
	f.Add("title a\nversion 1\nsort-key k\nlinux /k\ninitrd /i $x\noptions a=b $kernelopts\n", "default a*\n", "+3-1")
	f.Fuzz(func(t *testing.T, entry, loader, counter string) {
		name := "/loader/entries/a" + strings.ReplaceAll(counter, "/", "") + ".conf"
		s := searchOf(files{"/k": "kernel", "/i": "initrd", name: entry, "/loader/entries/b.conf": entry, "/loader/loader.conf": loader, "/EFI/Linux/u.efi": entry})
		within(t, func() {
			s.loadSaved()
			sane(t, s, s.entries())
		})
	})
}

func FuzzUKI(f *testing.F) {
	head := make([]byte, 1024)
	copy(head, "MZ")
	head[0x3c] = 0x40
	copy(head[0x40:], "PE\x00\x00\x64\x86\x02\x00")
	copy(head[0x58:], ".linux\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x02\x00\x00")
	copy(head[0x80:], ".cmdline\x10\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x10\x02\x00\x00")
	f.Add(head)
	f.Fuzz(func(t *testing.T, b []byte) {
		s := searchOf(files{"/EFI/Linux/u.efi": string(b)})
		within(t, func() { sane(t, s, s.efiPrograms(s.volumes[0])) })
	})
}

func FuzzVersions(f *testing.F) {
	f.Add("6.1.0-28-cloud-amd64", "6.10.3~rc1^2", "0")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		if compareVersions(a, a) != 0 || sgn(compareVersions(a, b)) != -sgn(compareVersions(b, a)) {
			t.Errorf("%q and %q are in no order", a, b)
		}
		if compareVersions(a, b) <= 0 && compareVersions(b, c) <= 0 && compareVersions(a, c) > 0 {
			t.Errorf("%q, %q and %q are in no order", a, b, c)
		}
	})
}

func sgn(n int) int {
	switch {
	case n < 0:
		return -1
	case n > 0:
		return 1
	}
	return 0
}

// bases makes small disks of all kinds that are read; those whose tools are missing are left out.
func bases(f *testing.F) (list [][]byte) {
	dir, out := f.TempDir(), f.TempDir()
	for name, text := range map[string]string{"boot/vmlinuz-1": "kernel", "boot/initrd.img-1": strings.Repeat("initrd", 1000), "boot/extlinux/extlinux.conf": "label x\nkernel /boot/vmlinuz-1\n", "etc/x": "", "usr/x": ""} {
		at := filepath.Join(dir, name)
		testenv.Check(f, os.MkdirAll(filepath.Dir(at), 0o755))
		testenv.Check(f, os.WriteFile(at, []byte(text), 0o644))
	}
	testenv.Check(f, os.Symlink("boot/vmlinuz-1", filepath.Join(dir, "vmlinuz")))
	script := func(s string) string { return "truncate -s 1M $IMG; printf '" + s + "' | sfdisk -q -X " }
	for _, c := range []string{
		"mke2fs -q -F -t ext4 -b 1024 -O ^has_journal -d $DIR $IMG 512K",
		"mke2fs -q -F -t ext4 -b 1024 -O inline_data,^has_journal -d $DIR $IMG 512K",
		"mke2fs -q -F -t ext2 -b 1024 -d $DIR $IMG 512K",
		"mke2fs -q -F -t ext4 -b 1024 -J size=1 -d $DIR $IMG 2M && debugfs -w -R 'feature needs_recovery' $IMG",
		"truncate -s 512K $IMG && mkfs.vfat $IMG && mcopy -s -i $IMG $DIR/boot ::",
		"mksquashfs $DIR $IMG -quiet -no-progress",
		"mksquashfs $DIR $IMG -quiet -no-progress -comp zstd",
		"genisoimage -quiet -R -o $IMG $DIR",
		script("start=34, size=100\\nstart=200, size=1000\\n") + "gpt $IMG",
		script("start=1, size=100, type=5\\nstart=5,size=3,type=83\\nstart=9,size=3,type=83\\n") + "dos $IMG",
	} {
		image := filepath.Join(out, "img")
		_ = os.Remove(image)
		cmd := exec.Command("sh", "-c", c)
		cmd.Env = append(os.Environ(), "DIR="+dir, "IMG="+image)
		if msg, err := cmd.CombinedOutput(); err != nil {
			f.Logf("%s: %v: %s", c, err, msg)
			continue
		}
		b, err := os.ReadFile(image)
		testenv.Check(f, err)
		list = append(list, b)
	}
	return list
}

// FuzzDisk changes bytes of disks: three bytes say where, one what. Only blocks of metadata are hit
// often, so an offset is also one of the first 4 KiB in half of the cases.
func FuzzDisk(f *testing.F) {
	list := bases(f)
	for i := range list {
		f.Add(uint8(i), []byte{0, 4, 0, 1})
		f.Add(uint8(i), []byte{0, 4, 0x18, 6, 0x80, 0, 1, 0xff, 0x81, 1, 2, 3})
	}
	f.Fuzz(func(t *testing.T, which uint8, changes []byte) {
		if len(list) == 0 {
			t.Skip("no tool makes a disk")
		}
		b := append([]byte{}, list[int(which)%len(list)]...)
		for ; len(changes) >= 4; changes = changes[4:] {
			off := int(changes[0])<<16 | int(changes[1])<<8 | int(changes[2])
			if changes[0]&0x80 != 0 {
				off %= 4096
			}
			b[off%len(b)] ^= changes[3]
		}
		within(t, func() {
			entries, err := Disk(strings.NewReader(string(b)), int64(len(b)))
			if err != nil {
				return
			}
			for _, e := range entries {
				if i, err := e.Image(); err == nil {
					_, _ = i.Kernel.WriteTo(io.Discard)
					_, _ = i.Initrd.WriteTo(io.Discard)
				}
			}
		})
	})
}
