package find_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

const version = "6.1.0-28-cloud-amd64"

// TestFileSystems makes file systems of all kinds and options, with a kernel and an initial
// RAM disk that are found by a vmlinuz alone, and compares byte by byte.
func TestFileSystems(t *testing.T) {
	kernel, initrd := blob("kernel", 3<<20+123), blob("initrd", 9<<20+1)+strings.Repeat("\x00", 5<<20)+blob("more", 70000)
	files := tree{"boot/vmlinuz-" + version: kernel, "boot/initrd.img-" + version: initrd, "etc/fstab": "", "usr/bin/x": "x"}
	linked := tree{"vmlinuz": "-> boot/vmlinuz-" + version, "boot/boot": "-> .", "loop": "-> loop"}
	for i := range 700 { // more than a block of names
		linked[fmt.Sprintf("usr/lib/a rather long name of a file %d", i)] = ""
	}
	for name, text := range files {
		linked[name] = text
	}
	for _, fs := range []struct {
		name string
		make maker
		tree tree
	}{
		{"ext4", ext("ext4"), linked},
		{"ext4 as Debian 13 makes it", ext("ext4", "-O", "metadata_csum_seed,orphan_file"), linked},
		{"ext4 with 1 KiB blocks", ext("ext4", "-b", "1024"), linked},
		{"ext4 with 2 KiB blocks and 512 byte inodes", ext("ext4", "-b", "2048", "-I", "512"), linked},
		{"ext4 without 64bit", ext("ext4", "-O", "^64bit,^metadata_csum"), linked},
		{"ext4 with inline data", ext("ext4", "-O", "inline_data"), linked},
		{"ext4 with meta_bg", ext("ext4", "-O", "meta_bg,^resize_inode", "-b", "1024", "-g", "1024"), linked},
		{"ext4 without a journal, small inodes", ext("ext4", "-O", "^has_journal,^flex_bg,^dir_index", "-I", "128"), linked},
		{"ext4 with casefold and large_dir", ext("ext4", "-O", "casefold,large_dir"), linked},
		{"ext4 with bigalloc", ext("ext4", "-O", "bigalloc"), linked},
		{"ext3", ext("ext3"), linked},
		{"ext2 with 1 KiB blocks", ext("ext2", "-b", "1024"), linked},
		{"FAT32", vfat("-F", "32"), files},
		{"FAT16", vfat("-F", "16"), files},
		{"FAT32 with 4 KiB clusters", vfat("-F", "32", "-s", "1"), files},
		{"squashfs gzip", squash(), linked},
		{"squashfs xz", squash("-comp", "xz"), linked},
		{"squashfs zstd, 4 KiB blocks", squash("-comp", "zstd", "-b", "4096"), linked},
		{"squashfs not compressed", squash("-noI", "-noD", "-noF", "-noX"), linked},
	} {
		t.Run(fs.name, func(t *testing.T) {
			t.Parallel()
			image := fs.make(t, fs.tree, 96)
			boots(t, image, "", expected{id: "vmlinuz-" + version, title: "Linux " + version, kernel: kernel, initrd: initrd, cmdline: "root=/dev/vda ro console=ttyS0"})
		})
	}
}

// TestISO reads an ISO 9660 with Rock Ridge names.
func TestISO(t *testing.T) {
	testenv.NeedTools(t, "genisoimage")
	kernel, initrd := blob("kernel", 1<<20), blob("initrd", 2<<20+7)
	dir := tree{"isolinux/isolinux.cfg": "default linux\nlabel linux\n kernel /boot/vmlinuz-" + version + "\n append initrd=/boot/Initrd.img quiet\n",
		"boot/vmlinuz-" + version: kernel, "boot/Initrd.img": initrd}.write(t)
	image := filepath.Join(t.TempDir(), "x.iso")
	command(t, "genisoimage", "-quiet", "-R", "-o", image, dir)
	boots(t, image, "", expected{id: "linux", kernel: kernel, initrd: initrd, cmdline: "initrd=/boot/Initrd.img quiet console=ttyS0"})
}

// TestFragmented reads files in many pieces: trees of extents with depth, holes, extents that are not
// written, and what e2fsck and debugfs leave.
func TestFragmented(t *testing.T) {
	testenv.NeedTools(t, "debugfs", "mke2fs")
	for _, kind := range []string{"ext4", "ext2"} {
		t.Run(kind, func(t *testing.T) {
			image := ext(kind, "-b", "1024")(t, tree{"boot/x": "", "etc/y": "", "usr/z": ""}, 64)
			// Files of one block each, of which every second one is removed: what is free has holes.
			var script strings.Builder
			small := filepath.Join(t.TempDir(), "small")
			if err := os.WriteFile(small, []byte(blob("small", 1000)), 0o644); err != nil {
				t.Fatal(err)
			}
			for i := range 4000 {
				fmt.Fprintf(&script, "write %s s%d\n", small, i)
			}
			for i := 0; i < 4000; i += 2 {
				fmt.Fprintf(&script, "rm s%d\n", i)
			}
			kernel := blob("kernel", 1800<<10) + strings.Repeat("\x00", 300<<10) + blob("end", 100<<10+3)
			at := filepath.Join(t.TempDir(), "kernel")
			if err := os.WriteFile(at, []byte(kernel), 0o644); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&script, "cd boot\nwrite %s vmlinuz-1\nwrite %s initrd.img-1\n", at, small)
			cmd := exec.Command("debugfs", "-w", "-f", "-", image)
			cmd.Stdin = strings.NewReader(script.String())
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("debugfs: %v\n%s", err, out)
			}
			boots(t, image, "", expected{id: "vmlinuz-1", kernel: kernel, initrd: blob("small", 1000), cmdline: "root=/dev/vda ro console=ttyS0"})
		})
	}
}

// TestJournal reads a file system that was not unmounted, whose newest directory is in its
// journal only.
func TestJournal(t *testing.T) {
	testenv.NeedRoot(t, "to mount")
	testenv.NeedTools(t, "mount", "umount", "losetup", "mke2fs", "sync")
	for _, options := range []string{"metadata_csum", "^metadata_csum,^64bit"} {
		t.Run(options, func(t *testing.T) {
			image := ext("ext4", "-O", options)(t, tree{"boot/vmlinuz-1": "old", "etc/x": "", "usr/x": ""}, 64)
			dir, copied := t.TempDir(), filepath.Join(t.TempDir(), "copy")
			command(t, "mount", "-o", "loop,commit=1000", image, dir)
			kernel := blob("new", 1<<20)
			mounted := true
			defer func() {
				if mounted {
					command(t, "umount", dir)
				}
			}()
			if err := os.WriteFile(filepath.Join(dir, "boot/vmlinuz-2"), []byte(kernel), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(dir, "boot/vmlinuz-1"), filepath.Join(dir, "boot/vmlinuz-0")); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(filepath.Join(dir, "boot/vmlinuz-2"))
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil { // the journal is committed, the rest has not been written
				t.Fatal(err)
			}
			f.Close()
			command(t, "cp", image, copied)
			command(t, "umount", dir)
			mounted = false
			boots(t, copied, "", expected{id: "vmlinuz-2", kernel: kernel, cmdline: "root=/dev/vda ro console=ttyS0"})
		})
	}
}
