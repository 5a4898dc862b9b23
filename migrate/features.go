package migrate

import (
	"slices"
	"strings"
)

// Features of the protocol that a migration may use. Those that it does use are
// named in CONFIG, and a destination that does not know one of them refuses before
// any page is sent. Whatever is added to the protocol has a name here, so that a
// host which is not upgraded yet still understands the migrations that do without.
const (
	featureVerifyPages = "verify-pages"  // HASHES
	featureZstd        = "compress-zstd" // PACKED by zstd
	featureLZ4         = "compress-lz4"  // PACKED by LZ4
	featureRenew       = "renew-keys"    // RENEW, over TLS
	featurePostcopy    = "postcopy"      // MISSING, and connections for what comes later
	// featureStorage is used where both sides know it, which HELLO_OK says.
	featureStorage = "compare-storage" // STORAGE
	// featureReset is known by a destination that can start a guest anew, and no source
	// names it: whether its guest will reset itself is not known before.
	featureReset = "reset"
	// featureSnapshot: what is received is kept and does not run, see [Snapshot]. Only a
	// receiver that is made for it knows it, and takes nothing else.
	featureSnapshot = "snapshot"
	featureDisks    = "copy-disks" // BLOCKS, and the list in READY
)

var knownFeatures = []string{featureVerifyPages, featureZstd, featureLZ4, featureStorage, featureReset, featureRenew, featureDisks, featurePostcopy}

// features are those that a migration under these options uses.
func (o Options) features() []string {
	var used []string
	if o.VerifyPages {
		used = append(used, featureVerifyPages)
	}
	switch o.Compression {
	case CompressZstd:
		used = append(used, featureZstd)
	case CompressLZ4:
		used = append(used, featureLZ4)
	}
	if o.CopyDisks {
		used = append(used, featureDisks)
	}
	if o.TLS != nil {
		used = append(used, featureRenew)
	}
	if o.SharedMemory {
		used = append(used, featureShared)
	}
	if o.Snapshot != nil {
		used = append(used, featureSnapshot)
	}
	if o.Postcopy != 0 {
		used = append(used, featurePostcopy)
	}
	return used
}

// checkFeatures says which of the features in use are not known here.
func checkFeatures(used, known []string) error {
	unknown := slices.DeleteFunc(slices.Clone(used), func(f string) bool { return slices.Contains(known, f) })
	if len(unknown) == 0 {
		return nil
	}
	return openly("this migration uses features that are not known here: %s", clip(strings.Join(unknown, ", ")))
}
